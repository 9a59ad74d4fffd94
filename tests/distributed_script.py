"""Jobs of several processes, for the tests to start.

``run_job`` has this file run as a program, once for all jobs, so that torch is imported once. For each job it forks
the processes and sets what torchrun would have set; each calls one of the functions of JOBS with the folder that the
outcome goes to. Under torchrun, the program is one process of one job.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import reference
import torch
import torch._dynamo  # (like the next two, to import it once for all processes)
import torch.distributed.fsdp
import torch.distributed.tensor
from resume_script import validation_score

from mingpt import distributed, tasks
from mingpt import trainer as trainer_module
from mingpt.datasets import CustomDataset
from mingpt.distributed.sharding import data_shard, shard
from mingpt.evaluation import evaluate as evaluate_model
from mingpt.experiments import multistep, presets, reproduction
from mingpt.experiments.predictor import Predictor
from mingpt.model import GPT
from mingpt.prefix import Prefix
from mingpt.storage.checkpoint import weights_hash
from mingpt.trainer import PrefixTrainer, Trainer
from mingpt.utils import set_seed

N_NEW = 5
COUNTS = (0, 1, 2, 3, 4, 5, 97)
"""With 1 to 4 processes: none, one, and one less than, as many as and one more than the processes."""


@functools.cache
def program() -> subprocess.Popen:
    """This file, waiting for jobs."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    return subprocess.Popen([sys.executable, __file__], **pipes)


def run_job(name: str, n_processes: int, folder: Path, **arguments) -> list:
    """Run a job and return what its processes returned; their stderr is in the error where one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps([name, n_processes, str(folder), arguments]), file=program().stdin)
    failed = json.loads(program().stdout.readline())
    assert not failed, (folder / "stderr").read_text()
    return [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(n_processes)]


def random_model(std: float = 0.2) -> GPT:
    """A small GPT whose tokens depend on what it reads."""
    return reference.random_model(std=std, n_head=2, n_embd=16, vocab_size=13, block_size=24)


def random_rows(n: int, length: int = 6) -> list[list[int]]:
    return torch.randint(13, (n, length), generator=torch.Generator().manual_seed(1)).tolist()


def generating_predictor(model: GPT, is_sampled: bool, on_batch=lambda batch: None, **options) -> Predictor:
    def predict(batch, sample_seeds):
        on_batch(batch)
        new = {"do_sample": is_sampled, "seed": sample_seeds.seed, "row_numbers": sample_seeds.indices}
        return model.generate(batch, N_NEW, **new)[:, -N_NEW:]

    return Predictor(torch.tensor, predict, model=model, **options)


# ---------------------------------------------------------------------------------------------------------- the jobs


def predict_everything(folder: Path) -> list:
    """Predict for every count of examples, batch size and way of decoding, and leave the files; returns the lists."""
    model, lists = random_model(), []
    for count in COUNTS:
        for batch_size in (1, 8):
            for is_sampled in (False, True):
                path = folder / f"{count}-{batch_size}-{is_sampled}.jsonl"
                lists.append(
                    generating_predictor(model, is_sampled, seed=3).predict(
                        random_rows(count), batch_size, "everything", path
                    )
                )
    return lists


def count_collectives(folder: Path) -> int:
    """How often the processes meet in a prediction of 50 batches, of which one process's are slow."""
    import torch.distributed as dist

    meetings = []
    for name in ("all_gather_object", "broadcast_object_list", "all_reduce", "barrier"):
        original = getattr(dist, name)
        setattr(dist, name, lambda *args, f=original, n=name, **kwargs: (meetings.append(n), f(*args, **kwargs))[1])
    slow = distributed.rank() == 1
    predictor = Predictor(list, lambda batch, _: time.sleep(0.01 * slow) or batch)
    assert predictor.predict(list(range(50)), 1) == list(range(50))
    return len(meetings)


def split_model(folder: Path, shape: list[int], rules: list[list]) -> dict:
    """The logits of a model split over a mesh against those of the whole one, and what it generates."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    whole, model, rows = random_model(), random_model(), random_rows(11)
    prefix = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2))
    distributed.init_process_group()
    mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=("data", "model"))
    placed = [(pattern, Shard(dimension)) for pattern, dimension in rules]
    options = {"mesh": mesh, "sharding_rules": placed, "seed": 3}
    difference = 0.0
    for prefixes in (None, prefix):

        def logits(batch, _, prefixes=prefixes):
            return model(batch, prefixes=prefixes)[0].double()

        split = torch.tensor(Predictor(torch.tensor, logits, model=model, **options).predict(rows, 4))
        with torch.no_grad():
            expected = whole(torch.tensor(rows), prefixes=prefixes)[0].double()
        difference = max(difference, (split - expected).abs().max().item())
    names = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    n_local = sum(
        p.to_local().numel()
        for p in model.parameters()
        if isinstance(p, DTensor) and not p.placements[0].is_replicate()
    )
    n_whole = sum(
        p.numel() for p in model.parameters() if isinstance(p, DTensor) and not p.placements[0].is_replicate()
    )
    path = folder / "split.jsonl"
    generated = generating_predictor(model, True, **options).predict(rows, 2, path=path)
    alone = whole.generate(torch.tensor(rows), N_NEW, do_sample=True, seed=3)[:, -N_NEW:].tolist()
    return {"difference": difference, "names": names, "share": n_local / n_whole, "same": generated == alone}


def predict_and_die(folder: Path, dies_after: int | None) -> int:
    """Predict in batches of 3; process 1 is killed after some of its batches. Returns how many rows were predicted."""
    seen = []

    def on_batch(batch):
        if dies_after is not None and distributed.rank() == 1 and len(seen) == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(len(batch))

    predictor = generating_predictor(random_model(), True, on_batch, seed=3)
    predictor.predict(random_rows(40), 3, path=folder / "out.jsonl")
    return sum(seen)


def three_steps(folder: Path, dies_in: str | None = None) -> dict:
    """The forum post's chain: the third task's prompts need the outputs of the first two. Says who called what."""
    calls, predicted = [], {}
    examples = [{"row": row, "n": number} for number, row in enumerate(random_rows(23, 4))]

    def prompt(name):
        def prompt_fn(examples, outputs):
            calls.append([name, sorted(outputs)])
            rows = [example["row"] for example in examples]
            for earlier in outputs.values():
                rows = [row + output for row, output in zip(rows, earlier, strict=True)]
            return rows

        return prompt_fn

    model = random_model()
    generate = model.generate

    def counting(prompts, n_new, **options):
        name = {2: "second", 3: "first", 4: "third"}[n_new]
        if name == dies_in and distributed.rank() == distributed.world_size() - 1 and name in predicted:
            os.kill(os.getpid(), signal.SIGKILL)
        predicted[name] = predicted.get(name, 0) + len(prompts)
        return generate(prompts, n_new, **options)

    model.generate = counting

    def step(name, *arguments, **fields):
        return multistep.Step(name, prompt(name), *arguments, **fields)

    steps = [
        step("third", ("first", "second"), max_new_tokens=4, options={"do_sample": True}),
        step("first", metric_fn=lambda outputs, _: {"mean": sum(map(sum, outputs)) / 69}, max_new_tokens=3),
        step("second", prefix=torch.ones(2, 2, 16), max_new_tokens=2),
    ]
    plan = multistep.Plan(model, steps)
    outputs = multistep.predict(plan, examples, 4, seed=5, folder=folder / "plan")
    metrics = multistep.evaluate(plan, examples, outputs)
    return {"calls": calls, "predicted": predicted, "outputs": outputs, "metrics": metrics}


def small_trainer(kind: str, n_iters: int, path: Path | None, **changes):
    """A trainer of a small model on batches of 12 rows, or of two prefixes for it."""
    config = Trainer.get_default_config()
    config.merge_from_dict({"device": "cpu", "precision": "float32", "progress": False, "max_iters": n_iters})
    config.merge_from_dict({"batch_size": 12, "learning_rate": 2e-3, "lr_schedule": "linear"} | changes)
    config.checkpoint_path = path
    options = {"length": 4, "num_digits": 6, "prefix_padding": 2}
    some_tasks = [tasks.SortAscending(), tasks.Add1() if kind == "prefix plateau" else tasks.InverseBinary()]
    data = CustomDataset("train", some_tasks, **options)
    model_config = GPT.get_default_config()
    model_config.merge_from_dict({"model_type": None, "n_layer": 2, "n_head": 2, "n_embd": 16, "init": "zero_residual"})
    model_config.merge_from_dict(dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0))
    model_config.merge_from_dict({"vocab_size": data.get_vocab_size(), "block_size": data.get_block_size()})
    model = GPT(model_config)
    if not kind.startswith("prefix"):
        return Trainer(config, model, data if kind == "model" else [data[i] for i in range(50)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    prefixes = torch.randn(2, 2, 2, 16).requires_grad_()
    config.learning_rate = 0.1
    if kind == "prefix plateau":
        config.validate_every, config.lr_schedule = 3, "linear"
        trainer_module.evaluate = validation_score
    return PrefixTrainer(config, model, [CustomDataset("train", [task], **options) for task in some_tasks], prefixes)


def train(folder: Path, kind: str, n_iters: int, end: int | None = None, **changes) -> dict:
    """Train up to iteration ``end``, from the checkpoint in the folder where there is one. Returns all losses."""
    set_seed(4 + distributed.rank())  # what the others start from must not matter
    trainer = small_trainer(kind, n_iters, folder / "run.safetensors", **changes)
    losses = []
    trainer.add_callback("on_batch_end", lambda t: losses.append(t.loss.item()))
    if end is not None:
        trainer.is_finished = lambda: trainer.iter_num >= end
    trainer.run()
    if kind == "prefix plateau":
        return {"losses": losses, "n_iters": trainer.n_iters.tolist()}
    return {"losses": losses}


def train_on_causal_lms(folder: Path, kinds: dict[str, str], shape: list[int] | None = None) -> dict:
    """Train a prefix for a Llama or a GPT-2 or both, split by FSDP2 and by rules over a mesh, and predict with it.

    Args:
        folder: for checkpoints.
        kinds: of prefixes, by the model's name.
        shape: of the mesh; without it the models are whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from mingpt.huggingface import CausalLM

    data = CustomDataset("train", [tasks.Add1()], length=4, num_digits=6, prefix_padding=3)
    sizes = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 16, "bos_token_id": None, "eos_token_id": None}
    llama = LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=48)
    makers = {"llama": lambda: LlamaForCausalLM(llama), "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**sizes))}
    rules = {
        "llama": [("embed_tokens|lm_head|(q|k|v|gate|up)_proj", Shard(0)), ("(o|down)_proj", Shard(1))],
        "gpt2": [(r"wte|lm_head|c_proj\.weight|c_fc\.bias", Shard(0)), (r"c_(attn|fc)\.weight", Shard(1))],
    }
    options = {"batch_size": 12, "learning_rate": 0.01, "grad_norm_clip": 1e9, "lr_schedule": "linear"}
    options |= {"precision": "float32", "progress": False, "max_iters": 2, "validate_every": 2, "validation_rows": 12}
    distributed.init_process_group()
    found = {}
    for (name, kind), split in itertools.product(kinds.items(), ("fsdp", "rules") if shape else ("whole",)):
        lm = CausalLM(makers[name]()).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in lm.requires_grad_(False).parameters():
            parameter.normal_(std=0.3, generator=generator)
        if kind == "key_value":
            lm.model.activation_checkpointing_enable()
        values = torch.randn(1, *((2, 2, 3, 16) if kind == "key_value" else (3, 32)), generator=generator)
        prefix, weights = Prefix(kind, values), weights_hash(lm)

        def predict(rows, _=None, lm=lm, prefix=prefix):
            new = lm.generate(rows, 2, lm.as_key_value(prefix))
            return torch.cat([lm(rows, prefixes=prefix)[0].flatten(1), new], dim=1)

        config = Trainer.get_default_config()
        config.merge_from_dict(options | {"device": "cpu"})
        if split == "fsdp":
            config.parallel = "fsdp"
        elif split == "rules":
            mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=("data", "model"))
            shard(lm, mesh["model"], rules[name])
            predictor = Predictor(torch.stack, predict, model=lm, mesh=mesh, sharding_rules=rules[name])
        set_seed(4)
        trainer = PrefixTrainer(config, lm, data, prefix)
        for path in (folder / f"{name} {split}", None, folder / f"{name} {split}"):  # last, back to what the first left
            config.checkpoint_path = path
            trainer.run()
        numbers = {"values": values, "gradient": trainer.adapter.values.grad}
        rows = data.batch(range(12))[0]
        is_shared = split == "rules"  # else all processes predict the same
        numbers["predictions"] = torch.tensor(predictor.predict(list(rows), 4)) if is_shared else predict(rows)
        numbers["score"] = torch.tensor(evaluate_model(lm, data.with_split("test"), prefix, 12).by_position)
        found[f"{name} {split}"] = {
            "numbers": {what: each.tolist() for what, each in numbers.items()},
            "is_unchanged": weights_hash(lm) == weights,
            "n_parameters": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in lm.parameters()),
            "data_shard": data_shard(lm),
        }
        if split == "fsdp":
            with pytest.raises(ValueError, match="split by FSDP2, so all processes must read the same rows"):
                Predictor(torch.stack, predict, model=lm).predict(list(rows), 4)
    return found


def evaluate(folder: Path) -> dict:
    """The scores of a run's model and prefixes in another folder, which are shared out."""
    config = presets.get_default_config("smoke")
    for key, value in {
        "model.n_embd": 8,
        "trainer.max_iters": 2,
        "prefix.max_iters": 2,
        "prefix.batch_size": 2,
    }.items():
        config.override(key, value)
    config.override("evaluation.n_rows", 20)
    config.override("evaluation.precision", "float32")
    results = reproduction.reproduce(config, folder / "run")
    return {"tasks": results["tasks"], "matrix": results["matrix"], "mixed": results["mixed"]}


def fail(folder: Path, who: int, where: str) -> None:
    """Have one process's code fail while the others go on; leaves the time at which it did."""

    def failing(*_):
        if distributed.rank() == who:
            (folder / "time").write_text(str(time.time()))
            raise ValueError("the ninth digit is missing")
        return ["0"]

    if where == "predict":
        Predictor(list, failing).predict(list(range(8)), 1)
    else:
        multistep.predict(multistep.Plan(random_model(), [multistep.Step("a", failing, max_new_tokens=1)]), [0])


def catch_errors(folder: Path, function: str, who: int) -> list:
    """What a process gets where one process's function fails, and whether all can meet after that."""

    def failing():
        if distributed.rank() == who:
            raise ValueError("no digit")

    text = None
    try:
        if function == "run_on_main":
            distributed.run_on_main(failing)
        else:
            distributed.map_over_ranks(dict.fromkeys(range(7), failing))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    return [text, distributed.all_gather("fine")]


JOBS = {
    job.__name__: job
    for job in (
        *(
            predict_everything,
            count_collectives,
            split_model,
            predict_and_die,
            three_steps,
            train,
            train_on_causal_lms,
            evaluate,
            fail,
            catch_errors,
        ),
    )
}


def run_as_process(rank: int, n_processes: int, port: int, name: str, folder: Path, arguments: dict) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result = JOBS[name](folder, **arguments)
    (folder / f"result{rank}.json").write_text(json.dumps(result))


def run_processes(name: str, n_processes: int, folder: Path, arguments: dict) -> bool:
    """Fork a job's processes and wait for them. Returns whether one has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = set()
    for rank in range(n_processes):
        child = os.fork()
        if not child:
            os.dup2(os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
            try:
                run_as_process(rank, n_processes, port, name, folder, arguments)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.add(child)
    has_failed = False
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not has_failed:  # as torchrun: the others have nothing to wait for any more
            has_failed = True
            for other in children:
                os.kill(other, signal.SIGKILL)
    return has_failed


def main() -> None:
    torch.set_num_threads(1)
    if "RANK" in os.environ:  # torchrun started this
        name, folder, arguments = sys.argv[1:]
        JOBS[name](Path(folder), **json.loads(arguments))
        return
    for line in sys.stdin:
        name, n_processes, folder, arguments = json.loads(line)
        print(json.dumps(run_processes(name, n_processes, Path(folder), arguments)), flush=True)


if __name__ == "__main__":
    main()
