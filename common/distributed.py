"""Communicates between the processes that torchrun starts.

In a single process no function here communicates, so the scripts never ask "am I distributed?". Tensors on
the CPU travel over gloo and tensors on a GPU over NCCL, so small control messages never wait for the GPU.
"""

import datetime
import itertools
import os

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from .engine.errors import ArgumentError, JobError, border

# renamed in newer versions of torch
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
TORCHRUN = "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe no job"


def start(device="auto"):
    """Joins the group that torchrun describes in the environment, if any; returns the device of this process.

    device: "auto" (a GPU if there is one), "cpu" or "cuda". Raises JobError if the environment describes no
    valid group, and ArgumentError if a node has fewer GPUs than processes.
    """
    with border(JobError, f"the environment variables {TORCHRUN}"):
        rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        world_size, processes = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if not (0 <= rank < world_size and local_rank >= 0 < processes and restarts() >= 0):
            raise ValueError(f"process {rank} of {world_size}, {local_rank} of {processes} on this node")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if (gpus := torch.cuda.device_count()) < processes:
            needed = "--device cuda needs a GPU for each process"
            error = ArgumentError(f"{needed}: {gpus} for {processes} on this node")
            error.speaks = local_rank == 0  # all processes of this node fail, other nodes may not
            raise error
        torch.cuda.set_device(local_rank)
    place = torch.device(device, local_rank if device == "cuda" else None)
    # float32 on a GPU: TF32 in convolutions, torch's default, and IEEE in matrix products and all else.
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = "tf32", "ieee"
    if ("RANK" in os.environ or world_size > 1) and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        with border(JobError, f"the environment variables {TORCHRUN}"):
            store, *_ = next(rendezvous("env://"))
            # The store of a restarted job still has the addresses of dead processes: use another prefix.
            store = dist.PrefixStore(f"start {restarts()}", store)
            # Clustering a data set between two steps can take longer than the default 10 minutes.
            timeout = datetime.timedelta(minutes=30)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout,
                                    device_id=place if device == "cuda" else None)
    return place


def restarts():
    """Returns how often torchrun has restarted this job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def cores():
    """Returns the number of CPU cores for this process: its share of the usable ones."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def stop():
    """Leaves the group. Call it once, at the very end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(x):
    """Returns the sum of x over ranks as a new tensor, equal on every rank. No gradient flows through it."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_max(x):
    """Returns the element-wise maximum of x over ranks as a new tensor."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def any_rank(*wishes):
    """Returns for each of the booleans whether any rank has it true; the result is equal on every rank."""
    return all_max(torch.tensor(wishes, dtype=torch.int32)).tolist()


def gather_rows(x, equal=False):
    """Concatenates the rows of x of all ranks in rank order; ranks may hold different numbers, also none.

    equal: all ranks hold the same number of rows: then counts are not exchanged, and nothing waits for a GPU.
    """
    if world_size() == 1:
        return x.detach().clone()
    if equal:
        rows = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        _all_gather(rows, x.detach().contiguous())
        return rows
    counts = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    counts[rank()] = len(x)
    counts = all_sum(counts).tolist()
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x.detach()
    blocks = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(blocks, padded)
    return torch.cat([block[:count] for block, count in zip(blocks, counts)])


def gather_on_main(x):
    """Returns all ranks' rows in rank order as a NumPy array on rank 0, no rows elsewhere. x: on the CPU."""
    counts = gather_rows(torch.tensor([len(x)])).tolist()
    main, filled = rank() == 0, 0
    rows = torch.empty(sum(counts) if main else max(counts), *x.shape[1:], dtype=x.dtype)
    for source, count in enumerate(counts):
        block = rows[filled : filled + count]  # other ranks reuse their first rows
        if source == rank():
            block.copy_(x)
        broadcast(block, source)
        filled += count if main else 0
    return rows[:filled].numpy()


def broadcast(x, source=0):
    """Copies x of rank `source` into x on every rank; returns x. Shapes must agree."""
    if world_size() > 1:
        dist.broadcast(x, src=source)
    return x


def from_main(function, *arguments):
    """Runs function(*arguments) on rank 0 only; every rank gets its result, or raises its exception.

    Use it for what one process must do or decide: scan a folder, read a checkpoint, create a directory.
    """
    box = [None]
    if rank() == 0:
        try:
            box = [(function(*arguments), None)]
        except Exception as error:  # whatever it is, every rank raises it
            if world_size() == 1:
                raise
            box = [(None, error)]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    result, error = box[0]
    if error is not None:
        raise error
    return result


def from_first(function, *arguments):
    """Runs function(*arguments) on the first process of each node; the others of the node get its result. If
    it raises anywhere, every process raises the error of the first node that has one.

    Use it for what lies on a node's own disks or in its memory: a data set.
    """
    if world_size() == 1:
        return function(*arguments)
    local, result, error = int(os.environ.get("LOCAL_RANK", 0)), None, None
    if local == 0:
        try:
            result = function(*arguments)
        except Exception as raised:
            error = raised
    places = [None] * world_size()
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))  # reading a billion headers
    dist.all_gather_object(places, (local, error), group=patient)
    for _, error in places:
        if error is not None:
            raise error
    firsts = [number for number, (local, _) in enumerate(places) if local == 0]
    for first, end in itertools.pairwise([*firsts, world_size()]):
        node, box = dist.new_group(range(first, end), backend="gloo"), [result]
        if first <= rank() < end:
            dist.broadcast_object_list(box, src=first, group=node)
            result = box[0]
    return result


def rows_of(n, rank, world_size):
    """Returns first and last + 1 of the data-set rows that a rank holds."""
    return rank * n // world_size, (rank + 1) * n // world_size


class ShardedRows:
    """Holds a table with one row per image, split over ranks: rank r has the rows [rN/W, (r+1)N/W).

    All ranks must write the same index and values: gather those of all ranks with gather_rows first. If an
    index occurs twice, either value may stay. shape: of a row. fill: initial value of the rows.
    """

    def __init__(self, N, *shape, device=None, dtype=torch.float32, fill=0):
        self.first, self.last = rows_of(N, rank(), world_size())
        # The last row is a dummy for images of other ranks: filtering them out would make the GPU wait.
        self.table = torch.full((self.last - self.first + 1, *shape), fill, device=device, dtype=dtype)
        self.nbytes = self.table.nbytes

    @property
    def local(self):
        """The rows that this rank holds."""
        return self.table[:-1]

    def place(self, index):
        """Returns the row of table for each image of index (B,): the dummy for images of other ranks."""
        here = (index >= self.first) & (index < self.last)
        return torch.where(here, index - self.first, self.last - self.first)

    def write(self, index, values):
        """Writes values, a number or (B, *shape), to the rows of images index (B,), the same on all ranks."""
        self.table[self.place(index)] = values

    def state(self):
        """Returns all ranks' rows in data-set order, (N, *shape), on the CPU. All ranks must call it."""
        return gather_rows(self.local).cpu()

    def load(self, rows):
        """Copies this rank's rows from `rows`, those of all ranks."""
        self.local.copy_(rows[self.first : self.last])
