"""Models of the transformers package through hooks, against the numbers that the package itself computes."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loopscope
from foreign_models import assert_untouched
from loopscope.errors import CheckpointError, ConfigError, MissingDependencyError, NonFiniteError
from loopscope.models.contract.check import check_subject
from loopscope.models.hooks.hooked import HookedSubject

transformers = pytest.importorskip("transformers")

REFERENCE = Path(__file__).resolve().parent / "reference"
CASES = {"gpt2-tiny": "layer", "gpt-neox-tiny": "layer", "hrm-text-tiny": "visit"}
"""What a layer's tensors are called in the recorded file."""

IDS = torch.arange(14).reshape(2, 7) * 5 % 31


def load(folder: Path, **options: Any) -> HookedSubject:
    subject = loopscope.load(folder, device="cpu", **options)
    assert isinstance(subject, HookedSubject)
    return subject


def pretrained(subject: HookedSubject) -> Any:
    """The model with the attributes that the package gives it."""
    return subject.model


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_recorded_tensor(case: str, implementation: str) -> None:
    folder = REFERENCE / case
    expected = load_file(folder / "expected.safetensors")
    tolerance = json.loads((folder / "case.json").read_text())["tolerance"]
    subject = load(folder)
    pretrained(subject).set_attn_implementation(implementation)
    trace = loopscope.capture(subject, expected["input_ids"], attention=True)
    found: dict[str, Tensor] = {"logits": trace.logits}
    kind = CASES[case]
    for number, site in enumerate(trace.visits):
        found[f"{kind}.{number}"] = trace.residual(*site)
        found[f"attention.{'visit.' if kind == 'visit' else ''}{number}"] = trace.attention(*site)
    stacks = sum(name.startswith("stack_input") for name in expected)
    for recurrence in range(trace.recurrences):
        found[f"stack_input.{recurrence * stacks // trace.recurrences}"] = trace.injected(recurrence + 1)
        found[f"stack_output.{(recurrence + 1) * stacks // trace.recurrences - 1}"] = trace.loop_state(recurrence + 1)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **tolerance, msg=partial("{}: {}".format, name))
    recorded = {name for name in expected if name.startswith((f"{kind}.", "attention.", "logits"))}
    assert recorded <= set(found)
    assert_untouched(subject.model)


@pytest.mark.parametrize("case", CASES)
def test_the_contract_holds(case: str) -> None:
    check_subject(load(REFERENCE / case))


def test_hrm_text_is_laid_out_in_high_cycles() -> None:
    subject = load(REFERENCE / "hrm-text-tiny")
    info = subject.info
    assert (info.prelude, info.recurrent, info.coda) == (0, 8, 0)
    assert info.trained_recurrences == 2
    assert info.family == "hrm_text (hooked)"
    assert info.injection is None
    assert info.other_states == (5,)  # the last cycle of the L stack
    assert any("Injection" in sentence for sentence in subject.unobservable)
    trace = loopscope.capture(subject, IDS, recurrences=4)
    pretrained(subject).config.H_cycles = 4
    assert torch.equal(trace.logits, subject.model(IDS, use_cache=False).logits)


def test_an_analysis_of_hrm_text(tmp_path: Path) -> None:
    study = loopscope.analyze(
        REFERENCE / "hrm-text-tiny", IDS.tolist(), out=tmp_path / "study", recurrences=4, horizon=6, device="cpu"
    )
    assert study.dataset["residual_norm"].sizes["layer"] == 8
    assert study.manifest["model"]["injection"] is None
    page = loopscope.write_report(study, tmp_path / "report.html")
    assert "hrm_text (hooked)" in page.read_text()


def test_a_prompt_that_was_trained_to_be_read_in_both_directions(tmp_path: Path) -> None:
    folder = REFERENCE / "hrm-text-tiny"
    causal, trained = load(folder), load(folder, prefix="trained")
    both = torch.ones_like(IDS)
    for subject, options in ((causal, {}), (trained, {"token_type_ids": both})):
        expected = pretrained(subject)(IDS, use_cache=False, **options).logits
        assert torch.equal(loopscope.capture(subject, IDS).logits, expected)
        reading = subject.info.prefix
        said = [sentence for sentence in subject.unobservable if sentence.startswith("Direction")]
        assert len(said) == 1
        assert ("reads it causally here" if reading == "causal" else "and does so here") in said[0]
    assert (causal.facts.behind.causal, trained.facts.behind.causal) == (True, False)
    check_subject(trained)
    assert loopscope.load("demo:injected").info.prefix is None
    study = loopscope.analyze(folder, IDS.tolist(), recurrences=2, horizon=2, device="cpu")
    assert study.manifest["model"]["prefix"] == study.manifest["settings"]["prefix"] == "trained"
    assert loopscope.inspect_model(folder).unobservable[-1].startswith("Direction: the model was trained to read")
    with pytest.raises(ConfigError, match=r"prefix='causal' comes too late: .* with 'trained'"):
        loopscope.analyze(trained, IDS.tolist(), recurrences=2, horizon=2, prefix="causal")


def tiny(kind: str, **changes: Any) -> Any:
    """A random model of a kind of decoder."""
    sizes = {
        "vocab_size": 31,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
    }
    config = transformers.AutoConfig.for_model(kind, **(sizes | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # so that attention is not all but uniform
    return model


DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma-2": ("gemma2", {"sliding_window": 3, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 9}),
    "Gemma-3": ("gemma3_text", {"sliding_window": 3}),
    "Llama": ("llama", {}),
    "Qwen2": ("qwen2", {}),
    "GPT-2": ("gpt2", {"n_embd": 24, "n_head": 4, "n_layer": 3, "n_positions": 64}),
    "GPT-NeoX": ("gpt_neox", {"use_parallel_residual": True}),
    "Phi": ("phi", {"hidden_size": 32, "head_dim": 8}),
    "Mixtral": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_states_and_maps_are_those_that_the_package_hands_out(name: str, padded: bool) -> None:
    kind, changes = DECODERS[name]
    model = tiny(kind, **changes)
    mask = torch.ones_like(IDS)
    if padded:
        mask[1, 4:] = 0
    trace = loopscope.capture(loopscope.hook(model), IDS, attention_mask=mask if padded else None, attention=True)
    assert_untouched(model)
    model.set_attn_implementation("eager")
    theirs = model(IDS, attention_mask=mask, use_cache=False, output_attentions=True, output_hidden_states=True)
    there = mask.bool()
    close(trace.logits[there], theirs.logits[there])
    for layer in range(3):
        # The last hidden state that the package hands out is after the final norm.
        if layer < 2:
            close(trace.residual("prelude", layer)[there], theirs.hidden_states[layer + 1][there])
        rows = theirs.attentions[layer].transpose(1, 2)[there]
        close(trace.attention("prelude", layer).transpose(1, 2)[there], rows)
    if "sliding_window" in changes:
        assert (trace.attention("prelude", 0)[0, :, 6, :4] == 0).all()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_model_with_few_positions() -> None:
    model = tiny("gpt2", n_embd=24, n_head=4, n_layer=2, max_position_embeddings=5)
    subject = loopscope.hook(model)
    assert subject.info.max_positions == 5
    with pytest.raises(ConfigError, match="has 7 tokens; GPT2LMHeadModel has 5 positions"):
        loopscope.capture(subject, IDS)


def test_gemma_2_keeps_its_soft_cap_whatever_the_implementation() -> None:
    capped, free = (
        loopscope.capture(loopscope.hook(tiny("gemma2", attn_logit_softcapping=cap)), IDS, attention=True)
        for cap in (0.05, 50.0)
    )
    assert not torch.allclose(capped.attention("prelude", 0), free.attention("prelude", 0), atol=1e-2)


def test_attention_in_a_compiled_kernel_is_not_seen_and_said() -> None:
    def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        causal = torch.ones(query.shape[2], key.shape[2]).tril().log()
        weights = (query @ key.transpose(-1, -2) * module.scaling + causal).exp()
        return ((weights / weights.sum(-1, keepdim=True)) @ value).transpose(1, 2), None

    transformers.AttentionInterface.register("kernel of the tests", kernel)
    model = tiny("llama", num_key_value_heads=4)
    model.set_attn_implementation("kernel of the tests")
    subject = loopscope.hook(model)
    assert subject.info.heads is None
    assert sum("no attention that is understood" in sentence for sentence in subject.unobservable) == 3


def test_a_model_that_loops_over_shared_layers() -> None:
    """ALBERT: one layer, as often as its configuration says."""
    config = transformers.AlbertConfig(
        vocab_size=31, hidden_size=24, embedding_size=8, intermediate_size=40, num_attention_heads=4,
        num_hidden_layers=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AlbertForMaskedLM(config).eval()
    subject = loopscope.hook(model)
    assert subject.found == (
        "a loop of albert.encoder.albert_layer_groups 0, 5 times, with 0 layers before and 0 after it; "
        "config.num_hidden_layers sets how often"
    )
    assert subject.info.trained_recurrences == 5
    assert subject.info.injection == "none"
    assert subject.facts.unseen == {}
    assert not subject.facts.behind.causal
    check_subject(subject)
    trace = loopscope.capture(subject, IDS, recurrences=7, attention=True)
    config.num_hidden_layers = 7
    states = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(trace.initial_state, states[0])
    for recurrence in range(1, 8):
        assert torch.equal(trace.loop_state(recurrence), states[recurrence])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    copy = tmp_path / "gpt2"
    shutil.copytree(REFERENCE / "gpt2-tiny", copy)
    return copy


def change(folder: Path, **changes: Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ln_f.weight": None}, r"lacks 1 tensor that the model has, first 'transformer\.ln_f\.weight'"),
        ({"extra.weight": torch.ones(2)}, r"holds 1 tensor that the model does not have, first 'extra\.weight'"),
        (
            {"wpe.weight": torch.ones(30, 48)},
            r"'transformer\.wpe\.weight' in .* has shape \(30, 48\); config\.json asks",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    folder: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    change(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_buffers_that_some_files_hold_and_tied_heads_are_fine(folder: Path) -> None:
    expected = loopscope.capture(load(folder), IDS).logits
    weight = load_file(folder / "model.safetensors")["wte.weight"]
    change(folder, **{"h.0.attn.bias": None, "lm_head.weight": weight.clone()})
    assert torch.equal(loopscope.capture(load(folder), IDS).logits, expected)


def test_a_weight_that_is_not_a_number_is_named(folder: Path) -> None:
    change(folder, **{"ln_f.bias": torch.full((48,), float("nan"))})
    with pytest.raises(NonFiniteError, match=r"'transformer\.ln_f\.bias' in .*gpt2 holds NaN"):
        load(folder)


def test_the_dtype_is_the_one_asked_for(folder: Path) -> None:
    subject = load(folder, dtype="bfloat16")
    assert subject.info.dtype == "bfloat16"
    assert {parameter.dtype for parameter in subject.model.parameters()} == {torch.bfloat16}
    assert load(folder).info.dtype == "float32"


@pytest.mark.parametrize("kind", ["a_model_of_tomorrow", "t5"])
def test_a_model_that_nobody_knows_is_refused_with_both_reasons(folder: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "code.Model"}
    (folder / "code.py").write_text("raise SystemExit('code from a model folder was run')")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(
        CheckpointError, match=r"no family that loopscope reads itself, and transformers .* cannot load"
    ):
        load(folder)


def test_without_the_package_the_command_that_installs_it_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"no known family.*pip install 'loopscope\[transformers\]'"):
        load(folder)


def test_too_little_memory_is_said_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopscope.models.checkpoints.free_memory.available_memory", lambda device: 300_000)
    with pytest.raises(CheckpointError, match=r"The weights need 0\.4 MB in float32, and 0\.3 MB .* --dtype bfloat16"):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, "attention_bias = True; loopscope implements Llama"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act = 'relu2'; of the activations"),
        ("qwen3", {"attention_bias": True, "head_dim": 8}, "attention_bias = True; loopscope implements Qwen3"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}},
            "rope_type is 'longrope'",
        ),
    ],
    ids=["biases", "relu2", "qwen3-bias", "longrope"],
)
def test_a_known_family_with_a_setting_that_is_not_implemented(
    kind: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    if "rope_parameters" in changes:
        changes["rope_parameters"] |= {"rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 2.0}
    model = tiny(kind, **changes)
    model.save_pretrained(tmp_path)
    subject = load(tmp_path)
    assert subject.info.family == f"{kind} (hooked)"
    (note,) = subject.notes
    assert said in note
    assert "so the code of transformers" in note
    assert torch.equal(loopscope.capture(subject, IDS).logits, model(IDS, use_cache=False).logits)
    found = loopscope.inspect_model(tmp_path)
    assert (found.runs, found.prelude) == ("through hooks", subject.info.prelude)
    assert said in found.recognised_by


def test_a_setting_that_nobody_implements(tmp_path: Path) -> None:
    tiny("llama", attention_bias=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "wavy"}))
    with pytest.raises(CheckpointError, match=r"attention_bias = True; .*, and transformers .* cannot load it either"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_need_a_scale_are_not_taken_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file(weights | {name: weights[name].to(dtype)}, file, metadata={"format": "pt"})
    for read in (load, loopscope.inspect_model):
        with pytest.raises(CheckpointError, match=f"'{name}' in .* is stored as .*8.*; .* before it was quantised"):
            read(tmp_path)


def test_a_field_of_loops_that_transformers_does_not_know_is_not_passed_over(tmp_path: Path) -> None:
    """Its code would run the model without a loop, and it would be called feed-forward."""
    tiny("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    harmless: list[tuple[str, Any]] = [("num_loops", 1), ("n_ctx", 64), ("loop_layers", [])]
    for field, value in harmless:
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        assert not load(tmp_path).info.is_looped
    loops: list[tuple[str, Any]] = [("num_loops", 3), ("loop_layers", [0, 1]), ("recurrent_mode", "depth")]
    for field, value in loops:
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        for read in (load, loopscope.inspect_model):
            with pytest.raises(CheckpointError, match=f"sets {field} = .*, which GPT2Config of transformers does not"):
                read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2RecurrentLM"]}))
    for read in (load, loopscope.inspect_model):
        with pytest.raises(CheckpointError, match="names 'GPT2RecurrentLM' as what runs the model, which by its name"):
            read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": "2"}))
    with pytest.raises(CheckpointError, match=r"cannot load it either \(.*'n_layer': TypeError: .*adding-a-family"):
        load(tmp_path)


def test_what_goes_to_learned_sinks_is_a_measure_of_its_own() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    model = tiny("gpt_oss", num_local_experts=3, num_experts_per_tok=2, rope_parameters=rope)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.randn(4))
    subject = loopscope.hook(model)
    assert (subject.info.heads, subject.info.sink_heads) == (None, 4)
    assert sum("what goes to it is measured (sink_mass)" in each for each in subject.unobservable) == 3
    study = loopscope.analyze(subject, [IDS[0].tolist(), IDS[1, :4].tolist()])
    for prompt, ids in enumerate((IDS[:1], IDS[1:, :4])):
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
        expected = torch.cat([1 - maps.sum(-1).mean(-1) for maps in attentions])
        torch.testing.assert_close(torch.from_numpy(study.dataset["sink_mass"].values[..., prompt]), expected.detach())
    plain = loopscope.analyze(loopscope.hook(tiny("llama")), IDS)
    assert "no attention of the model has a column beside the tokens" in plain.manifest["left_out"]["sink_mass"]


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_tensors_that_were_saved_in_a_wrapper(wrapper: str, tmp_path: Path) -> None:
    model = tiny("gemma2")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"{wrapper}{name}": tensor for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    assert torch.equal(loopscope.capture(load(tmp_path), IDS).logits, model(IDS, use_cache=False).logits)
    inside = {name.replace("layers.1.", "layers.1._orig_mod."): tensor for name, tensor in weights.items()}
    save_file({f"{wrapper}{name}": tensor for name, tensor in inside.items()}, tmp_path / "model.safetensors")
    assert torch.equal(loopscope.capture(load(tmp_path), IDS).logits, model(IDS, use_cache=False).logits)
    save_file(
        {f"{wrapper}{name}": tensor for name, tensor in list(weights.items())[:-1]}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match="lacks 1 tensor"):
        load(tmp_path)
