"""The authors' ImageReward (PyPI ``image-reward==1.5``), made importable and buildable offline.

The package was written for transformers 4.27 and pulls in training libraries. Here only its network
and its scoring code are imported, under a name of our own, past both package ``__init__`` modules. What
they miss of old libraries is there during the import and gone afterwards; nothing that computes a
score is replaced.

    pip install --no-deps image-reward==1.5

It imports torch, torchvision, transformers and timm, which we depend on ourselves.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BlipConfig, modeling_utils, pytorch_utils
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

_PACKAGE = "official_image_reward_package"


def installed_folder(module: str, install: str) -> Path:
    """Return the folder of an oracle's package; skip the test without it, but fail in CI."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        reason = f"the official package is not installed: pip install --no-deps {install}"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason} (never skipped in CI)")
        pytest.skip(reason)
    return Path(spec.submodule_search_locations[0])


def import_past_init(alias: str, folder: Path, name: str, packages: tuple[str, ...] = ()) -> ModuleType:
    """Import a module of a package that is known as `alias`, without running any ``__init__``.

    Args:
        alias: What the package is called in ``sys.modules``, so that the real name stays free.
        folder: The package's folder.
        name: Dotted name of the module within the package.
        packages: Dotted names of the packages between the two.
    """
    for package in ("", *packages):
        module = ModuleType(f"{alias}.{package}".rstrip("."))
        module.__path__ = [str(folder.joinpath(*package.split(".")))]
        sys.modules.setdefault(module.__name__, module)
    with warnings.catch_warnings():
        # Among them: deprecated paths in timm, escapes in docstrings.
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{alias}.{name}")


@contextmanager
def stub_modules(stubs: dict[str, ModuleType]) -> Iterator[None]:
    """Have modules that are not installed, for as long as the context lasts.

    ``mock.patch.dict`` would also forget everything that is imported meanwhile.
    """
    absent = stubs.keys() - sys.modules.keys()
    sys.modules.update({name: stubs[name] for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@cache
def _modules() -> tuple[ModuleType, ModuleType]:
    """Return the package's modules ``ImageReward`` and ``models.BLIP.blip_pretrain``."""
    folder = installed_folder("ImageReward", "image-reward==1.5")
    names = ("fairscale", "nn", "checkpoint", "checkpoint_activations")
    stubs = {".".join(names[:end]): ModuleType(".".join(names[:end])) for end in range(1, 5)}
    # Checkpointing of activations, which is for training and switched off by default.
    stubs[".".join(names)].checkpoint_wrapper = None
    moved = {
        "apply_chunking_to_forward": pytorch_utils.apply_chunking_to_forward,
        "prune_linear_layer": pytorch_utils.prune_linear_layer,
        "find_pruneable_heads_and_indices": None,  # never called: nobody prunes heads here
    }
    verbosity = transformers.logging.get_verbosity()
    with stub_modules(stubs), mock.patch.multiple(modeling_utils, create=True, **moved):
        reward = import_past_init(_PACKAGE, folder, "ImageReward", ("models", "models.BLIP"))
    transformers.logging.set_verbosity(verbosity)
    pretrain = importlib.import_module(f"{_PACKAGE}.models.BLIP.blip_pretrain")
    bert = pretrain.BertModel
    # What transformers' base class did in version 4.
    bert.all_tied_weights_keys = {}
    bert.get_head_mask = lambda self, head_mask, layers: [head_mask] * layers
    bert.invert_attention_mask = _invert_attention_mask
    return reward, pretrain


def _invert_attention_mask(self: nn.Module, mask: Tensor) -> Tensor:
    """Turn ones and zeros into what is added to attention scores, as transformers 4 did."""
    return (1 - mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min


def official_tokenizer(vocabulary: str | Path) -> BertTokenizerLegacy:
    """Return the tokenizer that the official ``init_tokenizer`` makes, from a ``vocab.txt``.

    It is transformers' original tokenizer in pure Python; ours is the one in Rust. The official code
    passes no settings, so these are BERT's own: lower case, accents stripped.
    """
    tokenizer = BertTokenizerLegacy(str(vocabulary))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def official_transform() -> Callable[[Any], Tensor]:
    """Return the official preprocessing of a PIL image."""
    return _modules()[0]._transform(224)


def build_official(folder: Path, config: BlipConfig, vocabulary: Path) -> Any:
    """Build the official network with its own constructor, untrained, in evaluation mode.

    Its ``med_config.json`` is written to `folder` from `config`. The constructor has the sizes of the
    image tower and the head written in; a smaller `config` gives the same classes other numbers.
    """
    reward, pretrain = _modules()
    text, vision = config.text_config, config.vision_config
    med_config = folder / "med_config.json"
    med_config.write_text(
        json.dumps(
            {
                "add_cross_attention": True,
                "attention_probs_dropout_prob": 0.1,
                "encoder_width": vision.hidden_size,
                "hidden_act": text.hidden_act,
                "hidden_dropout_prob": 0.1,
                "hidden_size": text.hidden_size,
                "initializer_range": 0.02,
                "intermediate_size": text.intermediate_size,
                "layer_norm_eps": text.layer_norm_eps,
                "max_position_embeddings": text.max_position_embeddings,
                "model_type": "bert",
                "num_attention_heads": text.num_attention_heads,
                "num_hidden_layers": text.num_hidden_layers,
                "pad_token_id": 0,
                "type_vocab_size": 2,
                "vocab_size": text.vocab_size,
            }
        )
    )
    replaced: dict[str, Any] = {"init_tokenizer": lambda: official_tokenizer(vocabulary)}
    head = reward.MLP
    if vision.hidden_size != 1024:
        tower = sys.modules[f"{_PACKAGE}.models.BLIP.vit"].VisionTransformer(
            img_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_ratio=vision.intermediate_size / vision.hidden_size,
        )
        replaced["create_vit"] = lambda *_: (tower, vision.hidden_size)
    with (
        mock.patch.multiple(pretrain, **replaced),
        mock.patch.object(reward, "MLP", lambda _: head(text.hidden_size)),
    ):
        return reward.ImageReward(str(med_config)).eval()
