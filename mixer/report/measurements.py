"""What bench.py measures: a dataclass per kind of table row, and the flat rows of json and csv."""
import dataclasses
import typing
from dataclasses import dataclass


class Measurement:
    """One row of a table. `failed` says in one line why there are no numbers."""
    failed: str | None = None

    def as_row(self) -> dict[str, object]:
        """A flat dict: a group is replaced by its fields, and what was not measured is absent."""
        row = {}
        for name, value in vars(self).items():
            if dataclasses.is_dataclass(value):
                row |= vars(value)
            elif value is not None:
                row[name] = value
        return row

    @classmethod
    def from_row(cls, row: dict[str, object]):
        """The opposite of `as_row`. Raises TypeError if the row has an unknown key."""
        values = dict(row)
        for field in dataclasses.fields(cls):
            group = (typing.get_args(field.type) or (field.type,))[0]  # `Memory | None` -> Memory
            if dataclasses.is_dataclass(group):
                names = [f.name for f in dataclasses.fields(group)]
                if names[0] in values:
                    values[field.name] = group(**{name: values.pop(name) for name in names})
        return cls(**values)


@dataclass(frozen=True)
class Counts:
    """Deterministic properties of a model."""
    parameters: int
    gflop_per_image: float      # forward pass
    saved_mib_per_image: float  # what autograd keeps for the backward pass


@dataclass(frozen=True)
class Memory:
    """Peaks over three training steps in a fresh process, MiB."""
    training_mib: float          # CUDA: allocated tensors; CPU: growth of the process
    allocated_mib: float | None  # PyTorch's own count, CUDA only
    reserved_mib: float | None
    process_mib: float           # CUDA: all memory in use on the GPU; CPU: peak resident size
    before_mib: float            # process_mib before the model is created


@dataclass(frozen=True)
class Speed:
    """Milliseconds of a step (median, 20th and 80th percentile) and what follows from them."""
    training_ms: float
    training_p20: float
    training_p80: float
    training_images_per_s: float
    inference_ms: float
    inference_p20: float
    inference_p80: float
    inference_images_per_s: float
    seconds_per_25000_images: float  # one epoch, computed
    share_of_floor: float            # least possible time of a training step / its time
    matmul_gflop_s: float            # of a large matrix product
    copy_gb_s: float                 # of a large copy, bytes read and written


@dataclass(frozen=True)
class ModelMeasurement(Measurement):
    """What the model of one of the nine rows takes."""
    row: str
    batch_size: int
    counts: Counts | None = None
    memory: Memory | None = None
    speed: Speed | None = None
    failed: str | None = None


@dataclass(frozen=True)
class ResolutionMeasurement(ModelMeasurement):
    """What the model of one of the nine rows takes at one image size."""
    image_size: int = 0  # pixels square


@dataclass(frozen=True)
class MemoryMeasurement(Measurement):
    """One of the nine rows at one batch size."""
    row: str
    batch_size: int
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class StepMeasurement(Measurement):
    """The training step of one candidate, timed in turn with others."""
    row: str | None = None         # in the peers' table: one of the nine
    model: str | None = None       # in the kernels' table
    image_size: int | None = None  # in the kernels' table, pixels square
    way: str                       # the candidate: "ours", "timm", "fused", ...
    ms: float | None = None        # median
    p20: float | None = None
    p80: float | None = None
    faster: float | None = None    # how many times faster than the first candidate
    batch_size: int
    memory: Memory | None = None
    time_ratio: float | None = None    # in the peers' table: ours / peer
    memory_ratio: float | None = None
    failed: str | None = None


@dataclass(frozen=True)
class BlockMeasurement(Measurement):
    """One implementation of the fused block at one shape: one pass over one input."""
    shape: tuple[int, int, int, int]  # N, C, side, K
    batch_size: int
    mode: str | None = None           # "forward" or "forward + backward"
    way: str | None = None            # the candidate: "eager", "fused", ...
    ms: float | None = None           # median
    p20: float | None = None
    p80: float | None = None
    faster_than_eager: float | None = None  # times
    gb_s: float | None = None         # of the bytes that must be read and written
    copy_gb_s: float | None = None    # of a large copy
    saved_bytes_per_sample: float | None = None  # what autograd keeps
    failed: str | None = None


@dataclass(frozen=True)
class ShapeMeasurement(Measurement):
    """The fused block beside eager PyTorch at one shape on the CPU."""
    shape: tuple[int, int, int, int]  # N, C, side, K
    dtype: str | None = None
    mode: str | None = None           # "training": forward + backward; "evaluation": forward
    faster: float | None = None       # times
    failed: str | None = None

    @property
    def batch_size(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class Instructions:
    """Of machine code, per element of the activation and in all, then by class."""
    instructions: float
    float: float
    special: float   # exp2, reciprocal
    convert: float   # between float types
    integer: float   # addresses, masks, moves
    shuffle: float
    memory: float
    tensor: float
    sync: float      # barriers and jumps


@dataclass(frozen=True)
class LaunchEstimate(Measurement):
    """One launch of a Triton kernel, from its machine code: nothing of it was timed."""
    shape: tuple[int, int, int, int]  # N, C, side, K
    capability: int                   # 90 for sm_90
    gpu: str | None = None
    kernel: str | None = None
    registers: int | None = None      # per thread
    spilled_bytes: int | None = None  # per thread
    shared_bytes: int | None = None   # per program
    warps: int | None = None          # per program
    programs_per_sm: int | None = None
    rounds: int | None = None         # of programs on the fullest SM
    instructions: Instructions | None = None
    l2_bytes: float | None = None     # per element
    dram_bytes: float | None = None   # per element
    estimate_us: float | None = None
    binds: str | None = None          # the resource that takes this time
    floor_us: float | None = None     # bytes that must pass DRAM, or the matrix products
    failed: str | None = None

    @property
    def batch_size(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class TileMeasurement(Measurement):
    """One pass of the fused block with some of the launcher's choices replaced, on a GPU."""
    shape: tuple[int, int, int, int]  # N, C, side, K
    mode: str | None = None           # "forward" or "backward"
    knobs: dict | None = None         # empty: what the launcher chooses
    estimate_ms: float | None = None  # of that, from its machine code
    ms: float | None = None           # median
    p20: float | None = None
    p80: float | None = None
    faster: float | None = None       # times, than what the launcher chooses
    failed: str | None = None

    @property
    def batch_size(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class StageMeasurement(Measurement):
    """One stage of the data pipeline."""
    stage: str
    images_per_s: float | None = None  # median
    p20: float | None = None
    p80: float | None = None
    batch_size: int | None = None      # of a failed one
    failed: str | None = None


# the lists of bench.json, kernels.json, resolution.json, static.json and tune.json
LISTS = {"models": ModelMeasurement, "memory": MemoryMeasurement, "peers": StepMeasurement,
         "data": StageMeasurement, "blocks": BlockMeasurement, "shapes": ShapeMeasurement,
         "steps": StepMeasurement, "resolution": ResolutionMeasurement,
         "launches": LaunchEstimate, "tiles": TileMeasurement}


def from_json(result: dict) -> dict[str, list[Measurement]]:
    """{list: measurements} of the contents of one of these files."""
    return {name: [LISTS[name].from_row(row) for row in rows]
            for name, rows in result.items() if name in LISTS}
