"""Compute tests/data/hpsv3 with the authors' package: scores, token ids, sizes after resizing.

The authors pin transformers 4.45.2, so this runs in an environment of its own:

    python -m venv official && official/bin/pip install torch==2.14.1 torchvision==0.29.1 numpy pillow \\
        safetensors accelerate pyyaml requests regex filelock packaging tqdm
    official/bin/pip install --no-deps transformers==4.45.2 tokenizers==0.20.3 \\
        huggingface_hub==0.26.5 hpsv3==1.0.0
    python -c "from diffsynth_metrics.testing import tiny_checkpoint; tiny_checkpoint('hpsv3', 'tiny')"
    official/bin/python tests/parity/build_hpsv3_fixture.py tiny tests/data/hpsv3

The first argument is a tiny checkpoint of ours; its tokenizer and config are copied, and its weights are
replaced by those of ``hpsv3_cases.random_weights``. Training libraries that the package imports are
stubbed; nothing that computes a score is replaced, except that in bfloat16 on the CPU, where the
authors' autocast for CUDA has no effect, the state is brought to float32 before the reward head.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._dynamo
import torchvision
import yaml
from hpsv3_cases import CASES, SEEDS, picture, random_sizes, random_weights
from safetensors import safe_open
from safetensors.numpy import save_file

FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("preprocessor_config.json", "chat_template.json"),
)
STUBS = {
    "trl": ("RewardTrainer", "get_kbit_device_map", "get_quantization_config"),
    "peft": ("PeftModel", "LoraConfig", "get_peft_model"),
    "datasets": ("Dataset",),
    "matplotlib": (),
    "matplotlib.pyplot": (),
    "matplotlib.patches": (),
    "torch.utils.tensorboard": ("SummaryWriter",),
    "fire": (),
    "pandas": (),
    "omegaconf": (),
}


def stub_training_libraries() -> None:
    for name, classes in STUBS.items():
        module: Any = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        for attribute in classes:
            setattr(module, attribute, type(attribute, (), {}))
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent in STUBS:
            setattr(sys.modules[parent], child, module)
    sys.modules["trl"].get_quantization_config = lambda config: None  # type: ignore[attr-defined]

    class OmegaConf:
        load = staticmethod(lambda path: yaml.safe_load(Path(path).read_text()))
        to_container = staticmethod(lambda values: values)

    sys.modules["omegaconf"].OmegaConf = OmegaConf  # type: ignore[attr-defined]


def official(folder: Path, *, bfloat16: bool) -> Any:
    """Return the authors' inferencer on a tiny checkpoint, made by their own constructor."""
    import hpsv3.inference

    config = yaml.safe_load((Path(hpsv3.__file__).parent / "config" / "HPSv3_7B.yaml").read_text())
    config |= {
        "model_name_or_path": str(folder),
        "bf16": bfloat16,
        "torch_dtype": "bfloat16" if bfloat16 else "float32",
        "use_cpu": True,
        "eval_strategy": "no",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    inferencer = hpsv3.inference.HPSv3RewardInferencer(
        str(path), str(folder / "model.safetensors"), device="cpu"
    )
    inferencer.model.rm_head.register_forward_pre_hook(lambda _, states: (states[0].float(),))
    return inferencer


@torch.no_grad()
def scores(inferencer: Any, indices: range) -> list[list[float]]:
    rewards = inferencer.reward(
        image_paths=[picture(index) for index in indices],
        prompts=[CASES[index][0] for index in indices],
    )
    return [[float(value) for value in row] for row in rewards.float()]


def digest_of_ids(inferencer: Any, index: int) -> str:
    """Return a digest of the ids up to and with the reward token."""
    batch = inferencer.prepare_batch(image_paths=[picture(index)], prompts=[CASES[index][0]])
    ids = batch["input_ids"][0].tolist()
    (reward_id,) = inferencer.model.special_token_ids
    used = ids[: ids.index(reward_id) + 1]
    return hashlib.sha256(json.dumps(used).encode()).hexdigest()


def size_of(inferencer: Any, width: int, height: int) -> list[int] | None:
    """Return the width and height that the authors' two resizings lead to, or None for an error."""
    from hpsv3.dataset.utils import smart_resize
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as second

    pixels = 256 * 28 * 28
    processor = inferencer.processor.image_processor
    try:
        sides = smart_resize(height, width, min_pixels=pixels, max_pixels=pixels)
        sides = second(*sides, 28, processor.min_pixels, processor.max_pixels)
    except ValueError:
        return None
    return list(sides[::-1])


def main() -> None:
    tiny, output = Path(sys.argv[1]), Path(sys.argv[2])
    torchvision.disable_beta_transforms_warning()
    stub_training_libraries()
    output.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(tiny / name, output / name)
    with safe_open(tiny / "model.safetensors", framework="pt") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
    results: dict[str, Any] = {"seeds": []}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for name in FILES:
                shutil.copyfile(tiny / name, folder / name)
            save_file(
                random_weights(shapes, seed), folder / "model.safetensors", metadata={"format": "pt"}
            )
            inferencer = official(folder, bfloat16=False)
            narrow = official(folder, bfloat16=True)
            everything = range(len(CASES))
            results["seeds"].append(
                {
                    "single": [scores(inferencer, range(i, i + 1))[0] for i in everything],
                    "batch": scores(inferencer, everything),
                    "bfloat16": [scores(narrow, range(i, i + 1))[0] for i in everything],
                }
            )
            results["ids"] = [digest_of_ids(inferencer, i) for i in everything]
            results["sizes"] = [[w, h, size_of(inferencer, w, h)] for w, h in random_sizes()]
    results["shapes"] = shapes
    (output / "official.json").write_text(json.dumps(results, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
