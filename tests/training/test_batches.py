"""Which examples make a batch: a function of the iteration's number, and the same for any number of processes."""

from __future__ import annotations

import itertools

import pytest
import torch

from mingpt import tasks
from mingpt.datasets import CustomDataset
from mingpt.training.batches import JointDataset, index_batches, is_batched, shard_indices


def take(n_batches, n_examples, start=0, seed=3, shard=(0, 1), batch_size=12):
    return [
        list(each) for each in itertools.islice(index_batches(n_examples, batch_size, start, seed, shard), n_batches)
    ]


@pytest.mark.parametrize("n_examples", [None, 50])
def test_a_batch_does_not_depend_on_where_the_run_started(n_examples):
    assert take(3, n_examples, start=4) == take(7, n_examples)[4:]


@pytest.mark.parametrize("n_examples", [None, 50])
@pytest.mark.parametrize("world_size", [2, 5, 12])
def test_processes_share_the_batch_that_one_has(n_examples, world_size):
    shares = [take(4, n_examples, shard=(rank, world_size)) for rank in range(world_size)]
    together = [list(itertools.chain(*batch)) for batch in zip(*shares, strict=True)]
    assert together == take(4, n_examples)
    sizes = {len(batch) for share in shares for batch in share}
    assert max(sizes) - min(sizes) <= 1


def test_indices_without_end_are_used_once():
    assert list(itertools.chain(*take(5, None))) == list(range(60))


def test_drawn_indices_depend_on_the_seed_and_stay_below_the_number_of_examples():
    drawn = list(itertools.chain(*take(20, 7)))
    assert set(drawn) == set(range(7))
    assert drawn != list(itertools.chain(*take(20, 7, seed=4)))


@pytest.mark.parametrize("indices", [range(10), list(range(10))])
def test_shares_keep_the_type(indices):
    assert type(shard_indices(indices, (1, 3))) is type(indices)


def new_dataset(task, **options):
    return CustomDataset("train", [task], **({"length": 4, "num_digits": 6, "prefix_padding": 3} | options))


def test_a_joint_batch_is_its_parts_in_order():
    datasets = [new_dataset(task) for task in (tasks.Add1(), tasks.InverseBinary(), tasks.SortAscending())]
    joint = JointDataset(datasets)
    parts = [(2, range(5, 8)), (0, range(1)), (2, [0, 3])]
    x, y = joint.batch(parts)
    own = [datasets[number].batch(indices) for number, indices in parts]
    assert torch.equal(x, torch.cat([x for x, _ in own]))
    assert torch.equal(y, torch.cat([y for _, y in own]))
    for (one_x, one_y), row_x, row_y in zip(joint.__getitems__(parts), x, y, strict=True):
        assert torch.equal(one_x, row_x)
        assert torch.equal(one_y, row_y)
    assert joint.describe() == [dataset.describe() for dataset in datasets]
    assert (joint.length, joint.prefix_padding) == (4, 3)


@pytest.mark.parametrize("options", [{"length": 3}, {"prefix_padding": 2}])
def test_joint_datasets_have_one_shape(options):
    with pytest.raises(ValueError, match=r"one length and one prefix_padding, got \[\("):
        JointDataset([new_dataset(tasks.Add1()), new_dataset(tasks.Add1(), **options)])


def test_a_joint_dataset_fits_where_each_does():
    small, large = new_dataset(tasks.InverseBinary()), new_dataset(tasks.Add1(), num_digits=20)
    large.check_fits(23, 10)
    for datasets in ([small, large], [large, small]):
        JointDataset(datasets).check_fits(23, 10)
        with pytest.raises(ValueError, match="22"):
            JointDataset(datasets).check_fits(22, 10)


class WithBatchSize:
    batch = 32


def test_only_a_method_batches():
    assert is_batched(new_dataset(tasks.Add1()))
    assert is_batched(JointDataset([new_dataset(tasks.Add1())]))
    assert not is_batched(WithBatchSize())
    assert not is_batched([])
