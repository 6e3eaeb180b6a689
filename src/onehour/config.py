"""What a run is: one frozen Recipe, checked when it is built, to and from TOML."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints

from onehour.messages import nearest
from onehour.recipe_checks import ADAM, ADAPTIVE, PITFALLS, refuse_together, refuse_values
from onehour.rules import schedule as schedules
from onehour.rules.adam import AdamOptions, adam_scaling
from onehour.rules.arguments import fraction, not_negative, positive, positive_int, whole_number
from onehour.rules.minibatch import Minibatch, ema_scaling, fixed_scaling, linear_scaling, parse_size, sqrt_scaling
from onehour.rules.names import layer_rates, patterns
from onehour.rules.ramp import Ramp, RampedSchedule, parse_ramp
from onehour.sidefile import Read, read_toml

__all__ = ["ADAPTIVE", "PITFALLS", "Recipe"]

LATER = (
    *("task", "collate", "beta1", "beta2", "epsilon", "scale_betas", "batchnorm", "recalibrate"),
    *("image_size", "test_resize", "train_transform", "random_erasing", "mixup", "cutmix", "label_smoothing"),
    *("clip_norm", "ema", "freeze", "layer_rates", "init", "validation", "continues", "ramp", "canonical_pass"),
)
"""Fields that 0.1 did not have: left out where they say nothing, so that its files and digests are what they were."""

SIZES = (
    "minibatch",
    "per_worker",
    "base_minibatch",
    "samples",
    "classes",
    "canonical_threads",
    "canonical_pass",
    "recalibrate",
)
COUNTABLE = 2**53
"""Up to which floats hold every whole number: what is counted in them is below it."""
SCALINGS = {"linear": linear_scaling, "sqrt": sqrt_scaling, "fixed": fixed_scaling, "adascale": fixed_scaling}
"""AdaScale's schedule is the base's own, and what it grows by is known when gradients are."""


def _said(default: Any, text: str, **flag: Any) -> Any:
    """A field with its help text, and what argparse is told of its flag beside that."""
    return field(default=default, metadata={"help": text, **flag})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run learns, and nothing about where it runs.

    The defaults are the paper's (§5.1). One dial, `minibatch`; rate, warmup, iterations and k follow from it.

    Raises:
        ValueError: for any value that no run can have, naming the value and what to use.

    >>> recipe = Recipe(name="mine", model="resnet50", data="images", samples=1_281_167, minibatch=8192)
    >>> recipe.target_lr, recipe.workers.workers
    (3.2, 256)
    """

    name: str = _said("custom", "what the run is called")
    model: str = _said(
        "", "a named model, timm:NAME, torchvision:NAME, or package.module:function that returns a module"
    )
    data: str = _said(
        "", "named data, a folder with train/ and val/, or package.module:function -> (train, validation)"
    )
    task: str | None = _said(
        None, "package.module:function (model, batch) -> onehour.Sums; default: classification by cross-entropy"
    )
    collate: str | None = _said(None, "package.module:function that turns a list of a task's samples into a batch")
    init: str = _said("", "weights to start from: a file, a run, timm:NAME or torchvision:NAME; the classes may differ")
    validation: float = _said(0.0, "share of each class to validate on, where the data has no validation part")
    continues: str = _said("", "the run, iteration and state that this run went on from; --continue writes it")
    samples: int | None = _said(None, "N, training samples; a run reads them from its data")
    classes: int | None = _said(None, "number of labels; by default from the data")
    resized: int | None = _said(
        None, "shorter side that a pack's larger images were resized to; a run reads it from its data"
    )
    bad_images: Literal["error", "skip"] = _said(
        "error", "skip trains on its worker's next sample in place of a bad one"
    )
    exif_orientation: bool = _said(False, "turn images as their EXIF says; the paper's tools did not")
    pixel_cap: int = _said(64_000_000, "refuse images of more pixels, by their header")
    image_size: int = _said(224, "side of the crops of images in a folder, an index or a pack, in pixels")
    test_resize: int | None = _said(None, "shorter side of test images before the crop; 8/7 of image_size unless given")
    train_transform: str = _said("", "package.module:function of decoded images in place of the training crop and flip")
    random_erasing: float = _said(0.0, "probability that a rectangle of a training image is set to zero")
    mixup: float = _said(0.0, "α: a worker's images are mixed in pairs by λ ~ Beta(α, α)")
    cutmix: float = _said(0.0, "α: a rectangle of an image is another one's; with mixup, one of the two is drawn")
    label_smoothing: float = _said(0.0, "ε of torch's cross-entropy, in training")
    minibatch: int = _said(256, "kn, images an update over all workers")
    per_worker: int = _said(32, "n, images a worker sees at once; BatchNorm's group, so part of the loss (§2.3)")
    batchnorm: Literal["ghost", "keep"] = _said(
        "ghost", "keep leaves the network's BatchNorm as it is, and takes one worker a pass, so that it sees n (§2.3)"
    )
    ramp: tuple[str, ...] = _said(
        (), "smaller minibatches before this one, each until an epoch: 256:8,1k:16", metavar="KN:EPOCH,…"
    )
    base_lr: float = _said(0.1, "η, the rate that is right at base_minibatch")
    base_minibatch: int = _said(256, "the minibatch that base_lr belongs to")
    scaling: Literal["linear", "sqrt", "fixed", "adascale"] = _said(
        "linear", "how the rate follows the minibatch (§2.1)"
    )
    scale_adaptive: bool = _said(False, "allow linear scaling with an optimizer that divides by the gradient's size")
    optimizer: str = _said("sgd", f"sgd, {', '.join(ADAPTIVE)}, or package.module:Class")
    momentum: float = _said(0.9, "m; for SGD and Muon")
    beta1: float = _said(0.9, "β₁ of Adam's kind that is right at base_minibatch")
    beta2: float = _said(0.999, "β₂ of Adam's kind that is right at base_minibatch")
    epsilon: float = _said(1e-8, "ε of Adam's kind that is right at base_minibatch")
    scale_betas: bool = _said(True, "with scaling sqrt, β, ε and AdamW's λ follow the minibatch as the rate does")
    nesterov: bool = _said(True, "Nesterov's form; plain momentum is equally good (§5.1)")
    weight_decay: float = _said(1e-4, "λ, coupled, not on normalisation's parameters (§3, Remark 1)")
    clip_norm: float | None = _said(
        None, "what the gradient's global norm is clipped to, after the division by kn (eq 2)"
    )
    ema: float | None = _said(None, "ρ of averaged weights, right at base_minibatch; evaluated beside the weights")
    freeze: tuple[str, ...] = _said((), "parameters that do not train, by name: stem.*,layer1.*", metavar="NAME,…")
    layer_rates: tuple[str, ...] = _said(
        (), "factors of the rate, by parameters' names: stem.*=0.1,head.*=10; in TOML a table", metavar="NAME=X,…"
    )
    epochs: float = _said(90, "passes over the data, whatever the minibatch; the last may be a part of one")
    decay: Literal["step", "cosine"] = _said("step", "the usual schedule after warmup")
    milestones: tuple[str, ...] = _said(("30", "60", "80"), 'epochs at which the rate drops; fractions as "64/3"')
    decay_factor: float = _said(0.1, "what each drop multiplies the rate by")
    warmup: Literal["gradual", "constant", "none"] = _said("gradual", "how the rate begins above base (§2.2)")
    warmup_epochs: float = _said(5, "epochs of warmup, counted inside the run's")
    zero_gamma: bool = _said(True, "γ = 0 in the last BatchNorm of each residual block (§5.1)")
    reduce: Literal["fast", "canonical"] = _said("fast", "canonical gives the same bits on any number of processes")
    canonical_threads: int = _said(1, "threads a process of a canonical run computes with: they are part of its bits")
    canonical_pass: int = _said(
        1, "workers that share a pass of a canonical run, which is faster: part of its bits, and p ≤ k / canonical_pass"
    )
    precision: Literal["float32", "bf16", "float64"] = _said("float32", "bf16 is autocast; weights stay float32")
    channels_last: bool = _said(False, "NHWC memory, faster for convolutions in bf16")
    compile: bool = _said(False, "torch.compile the model")
    recalibrate: int | None = _said(
        None, "training images from which BatchNorm's statistics are recomputed for each evaluation, for curves"
    )
    pitfall: str | None = _said(None, "one rule broken on purpose, to measure what it costs: " + ", ".join(PITFALLS))
    seed: int = _said(0, "decides weights, order and augmentation")

    def __post_init__(self) -> None:
        milestones = tuple(str(m) for m in schedules.parse_milestones(self.milestones))
        self._set("milestones", milestones)
        counts = ("minibatch", "per_worker", "base_minibatch", "canonical_threads", "canonical_pass")
        for name in (*counts, "pixel_cap", "image_size"):
            self._set(name, positive_int(name, getattr(self, name)))
        for name in ("samples", "classes", "resized", "recalibrate", "test_resize"):
            if getattr(self, name) is not None:
                self._set(name, positive_int(name, getattr(self, name)))
        for name in SIZES:
            if (getattr(self, name) or 0) >= COUNTABLE:
                raise ValueError(f"{name} has {len(str(getattr(self, name)))} digits; expected a number below 2**53")
        for name in ("task", "collate", "pitfall"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")
        for name in ("base_lr", "decay_factor"):
            self._set(name, positive(name, getattr(self, name)))
        self._set("weight_decay", not_negative("weight_decay", self.weight_decay))
        self._set("epochs", _whole(positive("epochs", self.epochs)))
        self._set("warmup_epochs", _whole(not_negative("warmup_epochs", self.warmup_epochs)))
        for name in ("momentum", "beta1", "beta2", "label_smoothing", "validation"):
            self._set(name, fraction(name, getattr(self, name), upper=1))
        for name in ("epsilon", "random_erasing", "mixup", "cutmix"):
            self._set(name, not_negative(name, getattr(self, name)))
        if self.clip_norm is not None:
            self._set("clip_norm", positive("clip_norm", self.clip_norm))
        if self.ema is not None:
            self._set("ema", positive("ema", fraction("ema", self.ema, upper=1)))
        self._set("freeze", patterns("freeze", self.freeze))
        self._set("layer_rates", layer_rates(self.layer_rates))
        self._set("ramp", tuple(f"{size}:{until}" for size, until in parse_ramp(self.ramp)))
        self._set("seed", whole_number("seed", self.seed))
        refuse_values(self, _types())
        refuse_together(self)
        if self.optimizer in ADAPTIVE:
            self.refuse_linear()
        if self.epochs * (self.samples or 1) >= COUNTABLE:
            raise ValueError(f"epochs {self.epochs:g} are more than 2**53 images; use fewer, such as 90")
        if self.decay == "step":
            schedules.step_decay(self.target_lr, self.milestones, self.decay_factor)
        _ = self.adam, self.workers

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def scales_linearly(self) -> bool:
        """Whether the rate follows the minibatch by the linear rule, and nobody has insisted that it shall."""
        return self.scaling == "linear" and self.minibatch != self.base_minibatch and not self.scale_adaptive

    def refuse_linear(self) -> None:
        """Refuse the linear rule for the recipe's optimizer, which is known to be adaptive."""
        if self.scales_linearly:
            raise ValueError(
                f"linear scaling does not hold for {self.optimizer}: its update is divided by the gradient's own"
                " size, so k times the minibatch does not ask for k times the rate; use scaling sqrt or fixed, or"
                " set scale_adaptive to insist"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Its fields: what was worked out from them, such as a schedule, cannot travel to another process."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def workers(self) -> Minibatch:
        """The minibatch as k workers of n."""
        return Minibatch.of(self.minibatch, self.per_worker)

    @cached_property
    def stages(self) -> tuple[tuple[Self, Fraction | None], ...]:
        """The recipe of each minibatch of a ramp, and the epoch until which it lasts; None is the end."""
        last = dataclasses.replace(self, ramp=()) if self.ramp else self
        smaller = [(dataclasses.replace(last, minibatch=size), until) for size, until in parse_ramp(self.ramp)]
        return (*smaller, (last, None))

    @property
    def fewest_workers(self) -> int:
        """k of the smallest minibatch: more processes than these would have none at first."""
        return self.stages[0][0].workers.workers

    @property
    def together(self) -> int:
        """How many workers must share a pass, since the bits of a canonical run depend on it."""
        return self.canonical_pass if self.reduce == "canonical" else 1

    def phases(self, samples: int) -> Ramp:
        """Which minibatch each iteration has, over N = `samples`."""
        return Ramp.of([(stage.workers, until) for stage, until in self.stages], samples=samples)

    @property
    def target_lr(self) -> float:
        """η̂, the rate after warmup."""
        return SCALINGS[self.scaling](self.base_lr, self.base_minibatch, self.minibatch)

    @cached_property
    def adam(self) -> AdamOptions | None:
        """What an optimizer of Adam's kind takes at this minibatch; None for others.

        >>> recipe = Recipe(optimizer="adamw", scaling="sqrt", base_lr=1e-3, weight_decay=0.05, minibatch=1024)
        >>> recipe.adam["weight_decay"], round(recipe.adam["betas"][0], 6)
        (0.1, 0.6)
        """
        if self.optimizer not in ADAM:
            return None
        follows = self.scaling == "sqrt" and self.scale_betas
        scaled = adam_scaling(
            base_minibatch=self.base_minibatch,
            minibatch=self.minibatch if follows else self.base_minibatch,
            lr=self.base_lr,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            decoupled=self.optimizer == "adamw",
        )
        return {**scaled, "lr": self.target_lr}

    @property
    def target_weight_decay(self) -> float:
        """λ at this minibatch: AdamW's follows it by the square-root rule, all others stay."""
        return self.weight_decay if self.adam is None else self.adam["weight_decay"]

    @property
    def target_ema(self) -> float | None:
        """ρ' of the averaged weights at this minibatch; None where none are kept."""
        return None if self.ema is None else ema_scaling(self.ema, self.base_minibatch, self.minibatch)

    @property
    def rate_factors(self) -> dict[str, float]:
        return {pattern: float(factor) for pattern, _, factor in (text.rpartition("=") for text in self.layer_rates)}

    @property
    def warms_up(self) -> bool:
        """Whether the rate starts below its target: only where it grew (§2.2).

        >>> Recipe(minibatch=256).warms_up, Recipe(minibatch=512).warms_up
        (False, True)
        """
        return self.warmup != "none" and self.warmup_epochs > 0 and self.target_lr > self.base_lr

    @cached_property
    def schedule(self) -> schedules.Schedule:
        """The rate as a function of the fractional epoch."""
        if self.ramp:
            begins = [0.0, *(float(until) for _, until in self.stages if until is not None)]
            return RampedSchedule(tuple(zip(begins, (stage.schedule for stage, _ in self.stages), strict=True)))
        if self.decay == "step":
            usual = schedules.step_decay(self.target_lr, self.milestones, self.decay_factor)
        else:
            usual = schedules.cosine_decay(self.target_lr, self.epochs)
        if not self.warms_up:
            return usual
        warmup = schedules.gradual_warmup if self.warmup == "gradual" else schedules.constant_warmup
        return warmup(usual, self.base_lr, self.warmup_epochs)

    @property
    def remarks(self) -> list[str]:
        """What the schedule does that may not be meant: milestones past the end or within the warmup, for example.

        >>> Recipe(epochs=60, milestones=("30", "60")).remarks
        ['milestone 60 is not before the end of the run of 60 epochs: the rate never drops there']
        """
        last = None
        if self.samples is not None and self.scaling != "adascale":
            ramp = self.phases(self.samples)
            last = ramp.position(ramp.iterations(self.samples, self.epochs) - 1) / self.samples
        warmup = self.warmup_epochs if self.warms_up else 0
        return schedules.schedule_remarks(
            self.schedule,
            milestones=schedules.parse_milestones(self.milestones) if self.decay == "step" else (),
            epochs=self.epochs,
            warmup=warmup,
            target=self.schedule(warmup) if self.ramp else self.target_lr,
            last=last,
        )

    def replace(self, **changes: Any) -> Self:
        """A recipe with some values changed; an unknown name is refused with the nearest.

        With other epochs, warmup and milestones keep their shares of the run, unless they are changed too.

        >>> short = Recipe(minibatch=512).replace(epochs=18)
        >>> short.warmup_epochs, short.milestones
        (1, ('6', '12', '16'))
        """
        return dataclasses.replace(self, **(self._shares(_known(changes)) | changes))

    def _shares(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Warmup, milestones and a ramp at the same shares of a run of other epochs; those that have no effect stay."""
        share = Fraction(positive("epochs", changes.get("epochs", self.epochs))) / Fraction(self.epochs)
        moved: dict[str, Any] = {}
        if share != 1 and changes.get("decay", self.decay) == "step":
            milestones = (m * share for m in schedules.parse_milestones(self.milestones))
            moved["milestones"] = tuple(str(milestone.limit_denominator(10**6)) for milestone in milestones)
        if share != 1:
            ramp = ((size, (until * share).limit_denominator(10**6)) for size, until in parse_ramp(self.ramp))
            moved["ramp"] = tuple(f"{size}:{until}" for size, until in ramp)
        if share != 1 and changes.get("warmup", self.warmup) != "none":
            moved["warmup_epochs"] = float(Fraction(self.warmup_epochs) * share)
        return moved

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain values, without those that are not given, or are newer than it needs."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        said = {f.name for f in fields(self) if f.name not in LATER or values[f.name] != f.default}
        if self.adam is not None and self.scaling == "sqrt":
            said.add("scale_betas")
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if value is not None and key in said
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The recipe of plain values; sizes may be written as "8k"."""
        values = dict(_known(values))
        for name in SIZES:
            if isinstance(values.get(name), str):
                try:
                    values[name] = parse_size(values[name])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        if isinstance(values.get("milestones"), list):
            values["milestones"] = tuple(values["milestones"])
        return cls().replace(**values)

    def to_toml(self) -> str:
        # Every JSON string, number, boolean and flat list is TOML too, once text beyond the BMP is not escaped.
        lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in self.as_dict().items())
        return "\n".join(lines).replace("\x7f", "\\u007f") + "\n"

    @classmethod
    def from_toml(cls, path: Path, *, unless_given: Mapping[str, Any] | None = None) -> Self:
        """Read a recipe from a TOML file; its texts are `Read`, and name no code unless somebody asks for it.

        Args:
            unless_given: values in place of the defaults, of fields that files may be older than.
        """
        values = read_toml(path)
        try:
            return cls.from_dict({**(unless_given or {}), **Read.every(values, path)})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(Recipe)


def _whole(value: float) -> float:
    """An int where it is one, so that a file says 5 however it was given."""
    return int(value) if value == int(value) else value


def _known(values: dict[str, Any]) -> dict[str, Any]:
    names = [f.name for f in fields(Recipe)]
    for name in values:
        if name not in names:
            raise ValueError(f"a recipe has no {name!r}; expected {nearest(name, names)}")
    return values
