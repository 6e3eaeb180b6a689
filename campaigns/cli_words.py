"""What the campaign on the command line draws from: values that fit, by flag, and values that fit nowhere."""

from __future__ import annotations

__all__ = ["JUNK", "PATHS", "TOML_VALUES", "WORDS"]


def words(text: str, *others: str) -> list[str]:
    """Those of a text, and others that have spaces or nothing in them."""
    return [*text.split(), *others]


PATHS = words(
    "run run half images images mine.toml recipe.toml curve.csv bad.csv net.safetensors net.pt bad.pt out.safetensors"
    " out.pt new new/below/it pack images.index . - nowhere nowhere/at/all /dev/null /dev/null/x /proc/nothing"
    " run/recipe.toml run/checkpoints ünïcödé new.index ~ $HOME *",
    *("", "out dir", "x" * 300, "a\0b", "\udcff"),
)
JUNK = words(
    "-1 0 -0 1e309 nan inf -inf 1e-400 0x10 1_000 ٣ １２ ½ %s%n {} {0} -- - = [1,2 ] ' \" \\ , ,, @ True None null auto"
    " 1e5 1.5 +1 8k8 k 1K 1ki os:getcwd os:nothing nowhere:x math:pi : a: :a a:b:c ..:x onehour:plan",
    *("", " ", "9" * 400, "\0", "\udcff", "\u202e", "\x1b[2J", "a" * 5000, "1 2", "\n", "\t1"),
)
SIZES = "32 64 128 256 1k 8k 16k 100 33 0 -32"
RATES = "0.1 0.2 1e-4 0 -0.1 1e9 1e-30 0.9 nan inf"
WORDS = {
    "number": words("1 2 3 4 8 0 -1 16 64 1000"),
    "recipe": words("digits digits mine.toml mine.toml resnet50 recipe.toml run/recipe.toml digts x.toml"),
    "data": words("digits images images.index pack nowhere digts math:pi"),
    "model": words("resnet8 resnet8 resnet18 resnet5 timm:x torchvision:resnet18 math:pi"),
    "minibatch": words(f"{SIZES} 32,64 256,8k 32, ,"),
    "per_worker": words("16 32 8 1 0 7 1k"),
    "base_minibatch": words(SIZES),
    "samples": words("8192 1281167 100 0 1"),
    "classes": words("10 1000 2 0 1 9"),
    "epochs": words("1 2 24 90 0 -1 100000"),
    "warmup_epochs": words("0 1 5 5/2 -1 1000"),
    "warmup": words("gradual constant none gradul"),
    "scaling": words("linear sqrt fixed none linaer"),
    "optimizer": words("sgd adam adamw sdg math:pi"),
    "precision": words("float32 bf16 float64 fp16"),
    "reduce": words("fast canonical slow"),
    "milestones": words("30,60,80 64/3 1,3/2 a,b 3,2,1 1/0 -1 nan", ""),
    "base_lr": words(RATES),
    "momentum": words("0.9 0 1 -1 nan 0.99"),
    "weight_decay": words(RATES),
    "base": words("0.1@256 0.1@8k 0.1 @256 x@1 nan@256 0.1@256@2"),
    "device": words("auto cpu cuda tpu"),
    "processes": words("1 2 4 3 0 -1 1,2 1,2,4 1,1 64"),
    "steps": words("1 20 0 -1"),
    "save_every": words("5 100 5m 0.1m m -5m nanm infm 1k"),
    "arm": words("warmup=none,constant table pitfalls none base_lr=0.1,0.2 x=1 warmup= = seed=1"),
    "arms_at": words(f"{SIZES} 32,64"),
    "tool": words("torch timm lightning accelerate hf keras"),
    "log": words("tensorboard wandb math:pi tensorbord"),
    "jobs": words("auto 1 2 0 -1"),
    "margin": words(RATES),
    "script": words("script.py nowhere.py mine.toml", ""),
    "arguments": words("-- a -x --lr"),
    "only": words("rate rate,decay , x", ""),
    "skip": words("rate x", ""),
    "images_per_second": words("100 0 -1 1e-9 nan inf 1e300"),
    "resize": words("256 1 0 -1"),
    "shard_mib": words("1024 1 0 -1"),
    "pixel_cap": words("1000000 1 0 -1"),
    "port": words("0 29500 -1 70000 80"),
    "seed": words("0 1 -1 4294967296 99999999999999999999"),
    "seeds": words("1 2 5 0 1k"),
}
TOML_VALUES = words(
    '0 -1 1 1.5 nan inf -inf 1e400 0x10 true false "" "x" \'\' [] ["a"] [[1]] {} 1979-05-27 1979-05-27T07:32:00Z'
    ' 07:32:00 "\\u0000" "\\ud800" "\\u202e" "sgd" "digits" 256 32 0.1 \'a:b\' \'math:pi\' = #',
    *("9" * 60, '["1", "2"]', "[1, 2]", "{a = 1}", "[" * 200, "[" * 200 + "]" * 200, "[" * 5000, '"""a\nb"""'),
    *('"' + "a" * 5000 + '"', "", "1 2"),
)
