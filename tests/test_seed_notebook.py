"""The calls of the notebook that this project started from, in its order: they must all work as it makes them."""

import os
import re

import pytest
import torch

import mingpt.data_tools as tasks
from mingpt.data_tools import CustomDataset, attention_visualization, batch_end_callback, eval, label_batch  # noqa: A004
from mingpt.model import GPT
from mingpt.trainer import PrefixTrainer, Trainer
from mingpt.utils import set_seed

N_LAYER, N_EMBD, N_ITERS = 2, 16, 2  # 12, 512 and 100,000 or 20,000 in the notebook

PRETRAINED = [
    *(tasks.SortAscending(), tasks.SortDescending(), tasks.Add1(), tasks.Modulo()),
    *(tasks.LessThan(), tasks.Divisible(), tasks.InverseBinary()),
]
NEW = [
    *(tasks.MoreThanEqual(), tasks.NotDivisible(), tasks.DoubleHistogram(), tasks.FilterAtLeastNTimes()),
    *(tasks.SortAscending() + tasks.Add1(), tasks.Add1() + tasks.LessThan(), tasks.LessThan() + tasks.Add1()),
    *(tasks.LessThan() + tasks.SortAscending(), tasks.Divisible() + tasks.Add1()),
]
NAMES = [
    *("SortAscending", "SortDescending", "Add1", "Modulo", "LessThan", "Divisible", "InverseBinary"),
    *("MoreThanEqual", "NotDivisible", "DoubleHistogram", "FilterAtLeastNTimes"),
    *("SortAscending+Add1", "Add1+LessThan", "LessThan+Add1", "LessThan+SortAscending", "Divisible+Add1"),
]


def show(x, y):
    """An example as the notebook prints it."""
    inputs = "".join(map(lambda x: f"{x:>4}", x.tolist()[:10]))  # noqa: C417
    outputs = "".join(map(lambda x: f"{x:>4}", y.tolist()[9:]))  # noqa: C417
    print(inputs + " ->" + outputs)


def show_samples():
    singles = [tasks.SortDescending(), tasks.SortAscending(), tasks.InverseBinary(), tasks.Add1()]
    singles += [tasks.Add1() + tasks.Add1(), tasks.DoubleHistogram(), tasks.Modulo(), tasks.LessThan()]
    for task in [*singles, *NEW, tasks.Divisible()]:
        print(f"> Sample from the {task} dataset:")
        x, y = CustomDataset("train", tasks=[task], prefix_padding=0, num_digits=10)[0]
        show(x, y)
    mixture = CustomDataset("train", prefix_padding=0, num_digits=10, tasks=PRETRAINED)
    for i in range(10):
        x, y = mixture[i]
        show(x, y)


def run_notebook():
    set_seed(1234)
    show_samples()

    prefix_size = 10
    train_mixture = CustomDataset("train", prefix_padding=prefix_size, num_digits=10, tasks=PRETRAINED)
    test_sets = {"random": CustomDataset("test", prefix_padding=prefix_size, num_digits=10, tasks=PRETRAINED)}
    for task in PRETRAINED:
        test_sets[str(task)] = CustomDataset("test", prefix_padding=prefix_size, num_digits=10, tasks=[task])

    model_config = GPT.get_default_config()
    model_config.model_type = None
    model_config.vocab_size = train_mixture.get_vocab_size()
    model_config.block_size = train_mixture.get_block_size()
    model_config.n_layer = N_LAYER
    model_config.n_head = 2
    model_config.n_embd = N_EMBD
    with pytest.warns(UserWarning, match="batch_size"):
        model_config.batch_size = 512
    model = GPT(model_config)

    fname = "06_pretrained.pth"
    if os.path.exists(fname):
        print("Loading weights from cache, won't train from scratch.")
        model.load_state_dict(torch.load(fname))
        model.config = model_config
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device)
    else:
        train_config = Trainer.get_default_config()
        train_config.learning_rate = 5e-4
        train_config.max_iters = N_ITERS
        train_config.num_workers = 0
        trainer = Trainer(train_config, model, train_mixture)
        trainer.set_callback("on_batch_end", batch_end_callback)
        trainer.run()
        device = trainer.device
        torch.save(model.state_dict(), fname)

    for name, test_set in test_sets.items():
        print(f"Performance on the {name} dataset:")
        _ = eval(model, dataset=test_set, device=device, max_batches=1)

    prefixes = dict()  # noqa: C408
    all_tasks = PRETRAINED + NEW
    for task, iterations, lr in zip(all_tasks, [N_ITERS] * len(all_tasks), [5e-5] * len(all_tasks)):  # noqa: B905
        task_name = str(task)
        fname = f"06_prefix_{task_name}.pth"
        train_set = CustomDataset("train", prefix_padding=prefix_size, num_digits=10, tasks=[task])
        test_set = CustomDataset("test", prefix_padding=prefix_size, num_digits=10, tasks=[task])
        if os.path.exists(fname):
            prefixes[task_name] = torch.load(fname)
            print(f"Prefix {task} loaded from cache.")
        else:
            print(f"TRAINING A PREFIX FOR THE {task_name.upper()} TASK:")
            shape = (model.config.n_layer, prefix_size, model.config.n_embd)
            prefixes[task_name] = torch.randn(shape, requires_grad=True, device=device)
            train_config = Trainer.get_default_config()
            train_config.num_workers = 0
            train_config.max_iters = iterations
            train_config.learning_rate = lr
            trainer = PrefixTrainer(train_config, model, train_set, prefixes[task_name])
            trainer.set_callback("on_batch_end", batch_end_callback)
            trainer.run()
            torch.save(prefixes[task_name], fname)
        _ = eval(model, dataset=test_set, device=device, max_batches=1, prefixes=prefixes[task_name])
        print()
    return model, prefixes


def test_the_notebook_runs_and_runs_again_from_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, prefixes = run_notebook()
    first = capsys.readouterr().out.splitlines()
    assert sorted(os.listdir()) == sorted(["06_pretrained.pth", *(f"06_prefix_{name}.pth" for name in NAMES)])
    assert list(prefixes) == NAMES
    other, other_prefixes = run_notebook()
    second = capsys.readouterr().out.splitlines()

    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    for name, prefix in prefixes.items():
        assert torch.equal(prefix, other_prefixes[name])
        assert prefix.shape == (N_LAYER, 10, N_EMBD)
        assert prefix.is_leaf
        assert prefix.requires_grad
        assert other_prefixes[name].requires_grad
    assert len({prefix.detach().numpy().tobytes() for prefix in prefixes.values()}) == len(NAMES)

    samples = [line for line in first if " ->" in line]
    assert len(samples) == 18 + 10
    assert all(re.fullmatch(r"([ \d]{4}){10} ->([ \d]{4}){10}", line) for line in samples)
    ascending = first[first.index("> Sample from the SortAscending dataset:") + 1].split("->")
    assert ascending[1].split() == sorted(ascending[0].split(), key=int)

    scores = [line for line in first if line.startswith("Final score")]
    assert len(scores) == 8 + 16
    for line in scores:
        n_correct, percent = re.fullmatch(r"Final score: (\d+)/100 = (\d+\.\d\d)% correct", line).groups()
        assert float(percent) == int(n_correct)
    # The second time is the first, but for where weights and prefixes come from.
    renamed = [f"TRAINING A PREFIX FOR THE {name.upper()} TASK:" for name in NAMES]
    loaded = [f"Prefix {name} loaded from cache." for name in NAMES]
    assert [line for line in first if line in renamed] == renamed
    assert [line for line in second if line in loaded] == loaded
    message = "Loading weights from cache, won't train from scratch."
    assert message in second
    assert message not in first
    replaced = dict(zip(renamed, loaded, strict=True))
    assert [replaced.get(line, line) for line in first] == [line for line in second if line != message]


def test_an_evaluation_says_what_it_returns(capsys):
    """32 batches of 100 rows are 3200; with a model that does nothing at all, none of them is right."""
    test_set = CustomDataset("test", prefix_padding=10, num_digits=10, tasks=[tasks.SortAscending()])
    config = GPT.get_default_config()
    config.model_type = "gpt-nano"
    config.vocab_size, config.block_size = test_set.get_vocab_size(), test_set.get_block_size()
    model = GPT(config)
    for parameter in model.parameters():
        parameter.data.zero_()
    result = eval(model, dataset=test_set, device="cpu", max_batches=32)
    assert result.item() == 0
    assert capsys.readouterr().out == "Final score: 0/3200 = 0.00% correct\n"


def test_what_else_the_notebook_imports(tmp_path):
    """It imports these two and leaves them to its reader."""
    import matplotlib

    matplotlib.use("agg")
    dataset = CustomDataset("test", prefix_padding=2, length=3, num_digits=5, tasks=[tasks.Add1()])
    x, y = dataset.batch(range(20))
    labels = label_batch(x, y, 2, 3)
    assert set(labels) == {"Add1", "Add1 or DoubleHistogram"}  # both make 3, 3, 3 of 2, 2, 2
    assert label_batch(x, y, 2, 3, as_ints=True) == [3 if label == "Add1" else -1 for label in labels]
    config = GPT.get_default_config()
    config.model_type = None
    config.vocab_size, config.block_size = dataset.get_vocab_size(), dataset.get_block_size()
    config.n_layer, config.n_head, config.n_embd = 1, 2, 8
    record = []
    tokens = GPT(config).eval().generate(x[:1, :5], 3, activations_record=record)
    attention_visualization(tokens[0], record, 2, 3, title="attention").savefig(tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 1000
