"""What a run is: a frozen setting whose hash names the run."""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

# No truth value and no text is a number; sizes end where no machine could hold them or come to an end.
Number: TypeAlias = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Strength: TypeAlias = Annotated[Number, Field(ge=0, le=1e30)]
Rate: TypeAlias = Annotated[Number, Field(gt=0, le=1e30)]
Fraction: TypeAlias = Annotated[Number, Field(ge=0, lt=1)]
Switch: TypeAlias = Annotated[bool, Field(strict=True)]
Whole: TypeAlias = Annotated[int, Field(strict=True)]
Positive: TypeAlias = Annotated[Whole, Field(gt=0, le=10**9)]
Width: TypeAlias = Annotated[Whole, Field(gt=0, le=10**5)]
Few: TypeAlias = Annotated[Whole, Field(gt=0, le=1000)]
Epochs: TypeAlias = Annotated[Whole, Field(gt=0, le=10**6)]
Seed: TypeAlias = Annotated[Whole, Field(ge=0, lt=2**53)]  # whole in every reader of JSON
Place: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]*$")]
JOINED = ("classes", "shrink")  # of the data: runs are named with and without them where these are unset


class Setting(BaseModel):
    """A group of settings: immutable, and every key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    added: ClassVar[tuple[str, ...]] = ()  # fields that older settings lack, whose defaults change nothing

    @model_serializer(mode="wrap")
    def _without_defaults_added_later(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A setting that was there before a field was added is written, and its run named, as it was then."""
        defaults = {name: type(self).model_fields[name].default for name in self.added}
        return {
            key: value
            for key, value in serialize(self).items()
            if key not in defaults or getattr(self, key) != defaults[key]
        }


class VGG(Setting):
    """Simonyan & Zisserman 2014, form D by default: stages of 3×3 convolutions, each ending in a 2×2 pooling."""

    name: Literal["vgg"] = "vgg"
    width: Width = Field(64, description="channels of the first stage; doubled at each stage up to eight-fold")
    stages: tuple[Few, ...] = Field(
        (2, 2, 3, 3, 3), min_length=1, max_length=30, description="convolutions in each stage"
    )
    hidden: Width = Field(512, description="units of the hidden linear layer")
    batch_norm: Switch = True
    dropout: Fraction = 0.0


class NIN(Setting):
    """Lin et al. 2014: three blocks of a convolution and two 1×1 convolutions, then a global average."""

    name: Literal["nin"] = "nin"
    width: Width = Field(192, description="channels of the widest layers; the first block narrows to half of it")
    batch_norm: Switch = False
    dropout: Fraction = 0.5


class DenseNet(Setting):
    """Huang et al. 2016 without bottleneck or compression: three blocks of (depth − 4)/3 layers."""

    name: Literal["densenet"] = "densenet"
    depth: Whole = Field(40, ge=7, le=1000)
    growth: Width = 12
    initial: Width = Field(16, description="channels of the first convolution")
    dropout: Fraction = 0.0

    @field_validator("depth")
    @classmethod
    def _three_equal_blocks(cls, depth: int) -> int:
        if (depth - 4) % 3:
            raise ValueError(
                f"depth {depth} does not divide into three equal blocks: depth − 4 must be a multiple of 3"
            )
        return depth


class Augmentation(Setting):
    """Random crops after zero padding, and mirror images, drawn anew for every example of every epoch."""

    pad: Whole = Field(
        0, ge=0, le=1000, description="pixels added on each side before cropping back to the image's own size"
    )
    flip: Switch = Field(False, description="mirror left and right with probability one half")


class Data(Setting):
    """Which images: ``digits``, ``few-digits``, a name on the Hugging Face hub, a folder of images or of parquet files.

    Environment variables in ``name`` (``${PHOTOGRAPHS}/cifar10``) are filled in when the images are read, so that a
    setting, and the name of its run, say nothing of where one machine keeps its files.
    """

    name: Place = "digits"
    train_size: Positive | None = Field(None, description="use this many training images, the same ones in every run")
    test_size: Positive | None = None
    classes: Annotated[Positive, Field(gt=1)] | None = Field(None, description="keep the first so many classes only")
    shrink: Annotated[Positive, Field(gt=1)] | None = Field(
        None, description="make images smaller by this factor: a box filter, then normalised again"
    )
    validation: Fraction = Field(
        0.0, description="hold this fraction of the training images out and test on it: for searches"
    )
    augmentation: Augmentation | None = None


class Vanilla(Setting):
    """Empirical risk minimisation and nothing else."""

    name: Literal["vanilla"] = "vanilla"


class Decay(Setting):
    """λ/2 Σ‖W‖²_F, Eq. (2) as corrected in docs/paper.md."""

    name: Literal["decay"] = "decay"
    strength: Strength = 1e-4


class Adversarial(Setting):
    """Eq. (3): ``alpha`` of the loss on the examples, the rest on examples moved by ``epsilon`` along the gradient."""

    name: Literal["adversarial"] = "adversarial"
    epsilon: Strength = Field(1.0, description="length of the perturbation, in units of the normalised input")
    alpha: Number = Field(0.5, ge=0, le=1)


class Spectral(Setting):
    """λ/2 Σσ(W)², Eq. (1) as corrected in docs/paper.md."""

    name: Literal["spectral"] = "spectral"
    strength: Strength = 0.01


class Jacobian(Setting):
    """λ times the mean of ‖∂f/∂x‖²_F, which the paper compares with in words."""

    name: Literal["jacobian"] = "jacobian"
    strength: Strength = 0.01
    projections: Few | None = Field(1, description="random directions of the output; all outputs if unset")


class LayerwiseJacobian(Setting):
    """λ times the mean of Σ‖∂xˡ/∂xˡ⁻¹‖²_F (Gu & Rigazio 2014)."""

    name: Literal["layerwise-jacobian"] = "layerwise-jacobian"
    strength: Strength = 1e-4
    projections: Few | None = Field(1, description="random directions of each layer's output; all if unset")


Curve: TypeAlias = Literal["input_gradient", "hessian", "jacobian", "perturbation"]


class Measuring(Setting):
    """What is measured besides loss and accuracy, on a fixed sample of training and of test images."""

    every: Positive | None = Field(None, description="epochs between measures during training; only after it if unset")
    curves: tuple[Curve, ...] = Field(
        get_args(Curve), min_length=1, description="which ones to measure during training"
    )
    examples: Positive = Field(256, description="images of each split")
    radii: tuple[Rate, ...] = Field((0.5, 1.0, 2.0, 4.0), min_length=1, max_length=1000)
    perturbations: tuple[Literal["random", "gradient", "pgd"], ...] = Field(("random", "gradient", "pgd"), min_length=1)
    steps: Few = Field(10, description="of projected gradient ascent")
    restarts: Few = 1


Model: TypeAlias = Annotated[VGG | NIN | DenseNet, Field(discriminator="name")]
Method: TypeAlias = Annotated[
    Vanilla | Decay | Adversarial | Spectral | Jacobian | LayerwiseJacobian, Field(discriminator="name")
]
Precision: TypeAlias = Literal["32-true", "bf16-mixed", "64-true"]


def check_compiles(compile: bool, method: Method) -> None:
    """Refuse a method that a compiled network cannot be trained with."""
    if compile and isinstance(method, Jacobian | LayerwiseJacobian):
        raise ValueError(
            f"compile = true, but the penalty of {method.name} is differentiated twice, which torch.compile cannot do: "
            "leave one of them out"
        )


class Config(Setting):
    """One run: everything that its numbers depend on, and nothing else.

    >>> config = Config(model=VGG(), method=Spectral(), batch_size=64, learning_rate=0.01, epochs=200)
    >>> config.name.startswith("vgg-digits-spectral-b64-s0-")
    True
    >>> config.name == config.model_copy(update={"seed": 1}).name
    False
    """

    model: Model
    data: Data = Data()
    method: Method
    batch_size: Positive
    learning_rate: Rate
    epochs: Epochs
    seed: Seed = 0
    momentum: Fraction = 0.9
    micro_batch: Positive = Field(
        1024, description="images in memory at a time; batch normalization takes its statistics over these"
    )
    precision: Precision = "32-true"
    measure: Measuring | None = Field(None, description="also measure sensitivity, curvature and spectra")
    evaluate_every: Positive = Field(
        1, description="epochs between evaluations of both whole splits; the last epoch always has one"
    )

    compile: Switch = Field(False, description="compile the network with torch.compile: equal to rounding")

    added: ClassVar[tuple[str, ...]] = ("evaluate_every", "compile")

    @model_validator(mode="after")
    def _compiles(self) -> "Config":
        check_compiles(self.compile, self.method)
        return self

    @property
    def hash(self) -> str:
        """Eight hexadecimal digits that change with any setting."""
        return self.name.rpartition("-")[2]

    @property
    def name(self) -> str:
        """The name of the run's folder: readable first, unique by a hash of all settings."""
        return self.names[0]

    @property
    def names(self) -> tuple[str, ...]:
        """``name``, and the one that the run had before there were the settings of `JOINED`."""
        data = self.data.name.rstrip("/").rsplit("/", 1)[-1]
        data = "".join(c if c.isprintable() and c != "\\" else "_" for c in data)
        stem = f"{self.model.name}-{data}-{self.method.name}-b{self.batch_size}-s{self.seed}"
        now = self.model_dump(mode="json")
        before = now | {"data": {k: v for k, v in now["data"].items() if k not in JOINED or v is not None}}
        return tuple(dict.fromkeys(f"{stem}-{_hash(settings)}" for settings in (now, before)))


def _hash(settings: dict[str, Any]) -> str:
    """Eight hexadecimal digits that change with any setting."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]
