"""Makes this folder's files with the published code of Parcae (github.com/SandyResearch/parcae, commit dee8363):

PYTHONPATH=<a checkout of it> python tests/parcae/make.py
"""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
SIZES = {
    "block_size": 16, "vocab_size": 14, "padding_multiple": 16, "n_embd": 32, "num_attention_heads": 2,
    "intermediate_size": 48, "recurrent_embedding_dimension": 32, "recurrent_intermediation_embedding_dimension": 48,
    "n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 2, "n_layers_in_coda": 1, "mean_recurrence": 4,
    "mean_backprop_depth": 2,
}  # fmt: skip
AS_PUBLISHED = {
    "bias": False, "tie_embeddings": True, "block_class_name": "TransformerPreNormBlock", "norm_class_name": "RMSNorm",
    "norm_eps": 1e-5, "mlp_class_name": "BaseMLP", "nonlin_name": "ReLU2", "qk_norm": True, "prelude_norm": True,
    "init_strategy": "scaled-zero", "init_orthogonal": True, "injection_type": "diagonal", "state_init": "like-init",
    "recurrent_iteration_method": "per-sequence", "sampling_scheme": "poisson-truncated-full",
}  # fmt: skip
RECURRENCES = 3

config = importlib.import_module("parcae_lm.models.parcae.config").ParcaeConfig(name="tiny", **SIZES, **AS_PUBLISHED)
model = config.construct_model().eval()
generator = torch.Generator().manual_seed(5)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            values = noise / 2 if "adapter" in name else 1 + noise / 5
        else:
            values = noise if "value_embeds" in name else noise / math.sqrt(parameter.shape[-1])
        # Exactly representable, so that the pickle is half as large.
        parameter.copy_(values.bfloat16())

found: dict[str, torch.Tensor] = {"input_ids": torch.tensor([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])}
calls: dict[str, int] = {}


def keep(name: str, module: torch.nn.Module) -> None:
    def hook(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        calls[name] = calls.get(name, -1) + 1
        found[name.format(calls[name])] = output.detach().clone()

    module.register_forward_hook(hook)


for layer, block in enumerate(model.transformer.prelude):
    keep(f"prelude.{layer}", block)
for layer, block in enumerate(model.transformer.core_block):
    keep("recurrent.{}." + str(layer), block)
for layer, block in enumerate(model.transformer.coda):
    keep(f"coda.{layer}", block)
keep("injected.{}", model.transformer.adapter)
keep("encoded", model.transformer.ln_prelude)
initial = model.initialize_state


def initialise(embedded: torch.Tensor) -> torch.Tensor:
    found["initial_state"] = initial(embedded)
    return found["initial_state"]


model.initialize_state = initialise
with torch.no_grad():
    torch.manual_seed(1)
    answer = model(found["input_ids"], return_logits=True, num_steps_pair=torch.tensor([RECURRENCES]))
found["logits"] = answer["logits"]
adapter = model.transformer.adapter
factors = {"mean": adapter.get_contraction_factor(), "largest": adapter.get_spectral_norm()}
weights = {name: values.bfloat16() if name != "freqs_cis" else values for name, values in model.state_dict().items()}
torch.save(weights, HERE / "model.pt")
save_file(found, HERE / "expected.safetensors")
written = dataclasses.asdict(config) | {"_class_name": "ParcaeConfig"}
(HERE / "config.json").write_text(json.dumps(written, indent=2) + "\n")
about = {"recurrences": RECURRENCES, "tolerance": {"atol": 2e-5, "rtol": 2e-5}, "factors": factors}
(HERE / "case.json").write_text(json.dumps(about, indent=2) + "\n")
