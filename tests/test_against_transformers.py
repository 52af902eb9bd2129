"""Feed-forward families against the transformers package: random models that it makes, saves and runs.

Every layer's output, every attention map and the logits are compared, for settings beyond those of the recorded cases.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loopscope
from loopscope.models.checkpoints.layout import read_layout
from loopscope.models.native.subject import NativeSubject

transformers = pytest.importorskip("transformers", minversion="5.0")

CLASSES = {"llama": "Llama", "mistral": "Mistral", "olmo2": "Olmo2", "qwen3": "Qwen3"}
TINY = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = 14

# Heads of 8 and a base of 100 turn once in 6, 20, 63 and 199 positions, so that each scaling treats pairs differently.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama of other sizes": (
        "llama",
        {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 14, "rms_norm_eps": 1e-3},
    ),
    "llama tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama with another activation": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama with another base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 100.0}}),
    "yarn": ("llama", {"rope_parameters": YARN | {"rope_theta": 100.0}}),
    "yarn untruncated": ("qwen3", {"rope_parameters": YARN | {"truncate": False, "beta_fast": 4, "beta_slow": 0.5}}),
    "yarn with a gain": ("mistral", {"rope_parameters": YARN | {"attention_factor": 0.7}}),
    "yarn with weights": ("qwen3", {"rope_parameters": YARN | {"mscale": 1.3, "mscale_all_dim": 0.6}}),
    "yarn with one weight": ("llama", {"rope_parameters": YARN | {"mscale": 1.3}}),
    "mistral with a window": ("mistral", {"sliding_window": 5}),
    "mistral without a window": ("mistral", {"sliding_window": None, "head_dim": 4}),
    "olmo2": ("olmo2", {}),
    "olmo2 tied": ("olmo2", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-4}),
    "qwen3": ("qwen3", {"head_dim": 10}),
    "qwen3 with windows": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3 with a list of windows": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": True,
        },
    ),
}


def random_model(name: str) -> Any:
    """Weights that leave their mark on the output; no norm is neutral."""
    family, settings = CASES[name]
    settings = {"attn_implementation": "eager"} | TINY | settings
    config = getattr(transformers, f"{CLASSES[family]}Config")(**settings)
    model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(len(name))
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 1.5 * noise * parameter.shape[1] ** -0.5)
    return model


def compare(model: Any, subject: NativeSubject, mask: Tensor | None = None) -> None:
    ids = torch.randint(0, 41, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    theirs = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True, use_cache=False)
    ours = loopscope.capture(subject, ids, attention=True, attention_mask=mask)
    keep = torch.ones(2, TOKENS, dtype=torch.bool) if mask is None else mask.bool()

    def close(ours: Tensor, theirs: Tensor, what: str) -> None:
        torch.testing.assert_close(ours[keep], theirs[keep], atol=2e-5, rtol=1e-5, msg=lambda text: f"{what}: {text}")

    layers = len(model.model.layers)
    assert [layer for _, layer, _ in ours.visits] == list(range(layers))
    for layer in range(layers - 1):  # the last one's output is handed out after the final norm
        close(ours.residual("prelude", layer), theirs.hidden_states[layer + 1], f"layer {layer}")
    close(subject.model.norm(ours.residual("prelude", layers - 1)), theirs.hidden_states[-1], "final norm")
    for layer in range(layers):
        close(ours.attention("prelude", layer).movedim(1, 2), theirs.attentions[layer].movedim(1, 2), f"map {layer}")
    close(ours.logits, theirs.logits, "logits")


def load(folder: Path) -> NativeSubject:
    subject = loopscope.load(folder, device="cpu")
    assert isinstance(subject, NativeSubject)
    return subject


def respell(folder: Path, settings: dict[str, Any]) -> None:
    """The spelling of version 4: rope_theta beside rope_scaling, torch_dtype, and a list of layers only if need be."""
    config = json.loads((folder / "config.json").read_text())
    if "layer_types" not in settings:
        config.pop("layer_types", None)
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope == {"type": "default"} else rope
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", CASES)
def test_a_family_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path)
    subject = load(tmp_path)
    assert subject.info.family == CASES[name][0]
    compare(model, subject)
    before = read_layout(tmp_path).architecture
    respell(tmp_path, CASES[name][1])
    assert read_layout(tmp_path).architecture == before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama3", "mistral with a window", "olmo2", "qwen3 with windows"])
def test_padded_batches_are_what_transformers_computes(name: str, side: str, tmp_path: Path) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, slice(0, 3) if side == "left" else slice(TOKENS - 3, None)] = 0
    compare(model, load(tmp_path), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "olmo2 tied"])
def test_narrow_weights_are_read_as_they_are(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    random_model(name).to(dtype).save_pretrained(tmp_path)
    assert set(read_layout(tmp_path).dtypes) == {str(dtype).removeprefix("torch.")}
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    compare(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options), load(tmp_path))


@pytest.mark.parametrize("name", ["llama tied", "qwen3"])
def test_several_files_are_one_checkpoint(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(read_layout(tmp_path).files) > 2
    compare(model, load(tmp_path))


@pytest.mark.parametrize("family", CLASSES)
def test_a_field_that_is_left_out_has_the_value_of_the_configuration_class(family: str, tmp_path: Path) -> None:
    needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    config = getattr(transformers, f"{CLASSES[family]}Config")(num_hidden_layers=1, hidden_size=128, vocab_size=9)
    model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    full = read_layout(tmp_path).architecture
    written = json.loads((tmp_path / "config.json").read_text())
    fewer = {name: written[name] for name in (*needed, "num_attention_heads")}
    (tmp_path / "config.json").write_text(json.dumps(fewer))
    assert read_layout(tmp_path).architecture == full
