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
class ConvMeasurement(Measurement):
    """The backward pass of a depthwise conv on the CPU, PyTorch's and ours; milliseconds."""
    shape: tuple[int, int, int, int]  # N, C, side, K
    batch_size: int | None = None     # of a failed one
    aten_median: float | None = None
    aten_p20: float | None = None
    aten_p80: float | None = None
    ours_median: float | None = None
    ours_p20: float | None = None
    ours_p80: float | None = None
    faster: float | None = None       # times
    failed: str | None = None


@dataclass(frozen=True)
class StageMeasurement(Measurement):
    """One stage of the data pipeline."""
    stage: str
    images_per_s: float | None = None  # median
    p20: float | None = None
    p80: float | None = None
    batch_size: int | None = None      # of a failed one
    failed: str | None = None


# the lists of bench.json, kernels.json and resolution.json
LISTS = {"models": ModelMeasurement, "memory": MemoryMeasurement, "peers": StepMeasurement,
         "data": StageMeasurement, "blocks": BlockMeasurement, "convs": ConvMeasurement,
         "steps": StepMeasurement, "resolution": ResolutionMeasurement}


def from_json(result: dict) -> dict[str, list[Measurement]]:
    """{list: measurements} of the contents of bench.json or kernels.json."""
    return {name: [LISTS[name].from_row(row) for row in rows]
            for name, rows in result.items() if name in LISTS}
