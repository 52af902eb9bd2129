"""What a user has at hand in Python: models in their wrappers, tokenizers, dtypes and token ids of other libraries."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

import loopscope
from foreign_models import ForeignLoop
from loopscope.analysis.job import SilentProgress
from loopscope.analysis.settings import AnalyzeSettings, parts_except
from loopscope.errors import ConfigError, PromptError
from loopscope.models.inspection.facts import RunSize
from loopscope.models.loading import as_subject
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.prompts.tokenizer import as_tokenizer
from small_models import INJECTED

REFERENCE = Path(__file__).resolve().parent / "reference"
IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5]])
FAST: dict[str, Any] = {"recurrences": 2, "horizon": 3, "skip": parts_except()}


def loop() -> nn.Module:
    torch.manual_seed(0)
    return ForeignLoop().eval()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


class Adapted(nn.Module):
    """As much of PEFT's wrapper as is asked for."""

    def __init__(self, inside: nn.Module, *, learned_prompt: bool = False) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = inside
        self.active_peft_config = SimpleNamespace(is_prompt_learning=learned_prompt, peft_type="PROMPT_TUNING")
        self.active_adapters = ["default"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model()(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        inside = self.base_model.model
        assert isinstance(inside, nn.Module)
        return inside


@pytest.mark.parametrize("wrappers", [(), (nn.DataParallel,), (compiled, nn.DataParallel), (Adapted, compiled)])
def test_a_model_is_taken_as_it_is_and_out_of_its_wrappers(
    wrappers: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", SimpleNamespace(PeftModel=Adapted))
    model = inside = loop()
    for wrapper in wrappers:
        model = wrapper(model)
    expected = inside(IDS)["logits"]
    assert torch.equal(loopscope.capture(model, IDS).logits, expected)
    subject = loopscope.hook(model)
    assert subject.model is inside
    assert subject.info.recurrent
    names = {nn.DataParallel: "DataParallel", compiled: "torch.compile", Adapted: "PEFT with the adapters default"}
    if wrappers:
        (note,) = subject.notes
        assert note.startswith("ForeignLoop was taken out of ")
        assert all(names[wrapper] in note for wrapper in wrappers)
    else:
        assert subject.notes == ()


def test_learned_tokens_before_the_text_are_no_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", SimpleNamespace(PeftModel=Adapted))
    with pytest.raises(ConfigError, match=r"learned tokens \(PROMPT_TUNING\) that PEFT puts before the text"):
        loopscope.hook(Adapted(loop(), learned_prompt=True))


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def test_an_analysis_of_a_module_says_what_it_was_taken_out_of() -> None:
    notes = Notes()
    study = loopscope.analyze(nn.DataParallel(loop()), IDS, progress=notes, **FAST)
    assert study.manifest["model"]["name"] == "ForeignLoop"
    assert "ForeignLoop was taken out of DataParallel." in notes.said


def test_a_native_model_in_a_wrapper_is_run_natively() -> None:
    subject = as_subject(nn.DataParallel(LoopedTransformer(INJECTED)))
    assert isinstance(subject, NativeSubject)


def test_token_ids_of_any_library_are_prompts() -> None:
    subject = loopscope.hook(loop())
    padded = {"input_ids": torch.tensor([[3, 1, 4], [0, 2, 6]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    given: list[tuple[Any, list[list[int]]]] = [
        (IDS, IDS.tolist()),
        (IDS[0], [IDS[0].tolist()]),
        (IDS.numpy(), IDS.tolist()),
        ([torch.tensor([1, 2, 3]), np.array([4, 5])], [[1, 2, 3], [4, 5]]),
        ([3, 1, 4], [[3, 1, 4]]),
        (padded, [[3, 1, 4], [2, 6]]),
    ]
    for prompts, expected in given:
        study = loopscope.analyze(subject, prompts, **FAST)
        assert [list(prompt["token_ids"]) for prompt in study.tokens] == expected
    for bad in (torch.rand(2, 3), torch.ones(1, 2, 3, dtype=torch.int64), torch.tensor([[True, False]])):
        with pytest.raises(PromptError, match="is not a list of whole numbers"):
            loopscope.analyze(subject, bad, **FAST)


def test_a_mapping_without_token_ids() -> None:
    with pytest.raises(PromptError, match="are its input_ids, and it has text only"):
        loopscope.analyze("demo:injected", {"text": ["The cat"]})


def words() -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "the": 1, "cat": 2, "sat": 3, "<unk>": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def test_a_beginning_that_a_text_spells_out_again_is_warned_of() -> None:
    subject = loopscope.hook(loop(), tokenizer=words())
    said = r"1 of 1 prompts begin with <s> twice"
    with pytest.warns(UserWarning, match=said) as by_capture:
        loopscope.capture(subject, "<s> the cat", recurrences=1)
    with pytest.warns(UserWarning, match=said) as by_analyze:
        loopscope.analyze(subject, ["<s> the cat"], **FAST)
    assert {each.filename for each in (*by_capture, *by_analyze)} == {__file__}  # the caller's own line
    notes = Notes()
    loopscope.analyze(subject, ["<s> the cat"], progress=notes, **FAST)  # told once
    assert sum("twice" in note for note in notes.said) == 1


def test_tokenizers_of_other_packages_are_taken() -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words(), bos_token="<s>", pad_token="<unk>")
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast(["the cat", "sat"], padding=True, truncation=True, max_length=2)  # which leaves both switched on
    for given in (words(), fast, as_tokenizer(words())):
        subject = loopscope.hook(loop(), tokenizer=given)
        study = loopscope.analyze(subject, ["the cat sat"], **FAST)
        assert list(study.tokens[0]["token_ids"]) == [0, 1, 2, 3]
    assert as_tokenizer(fast).chat_template is not None
    assert as_tokenizer(fast).padding is not None
    with pytest.raises(PromptError, match="tokenizer is a str; what can be used"):
        loopscope.hook(loop(), tokenizer="gpt2")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (torch.bfloat16, "bfloat16"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        (torch.half, "float16"),
        ("float32",) * 2,
    ],
)
def test_names_of_dtypes(given: Any, name: str) -> None:
    assert AnalyzeSettings(dtype=given).dtype == name
    assert RunSize(dtype=given).dtype == name
    assert loopscope.load("demo:injected", dtype=given, device="cpu").info.dtype == name


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ([torch.float32], "float32"),
        ([torch.bfloat16], "bfloat16"),
        ([torch.float16], "float16"),
        ([torch.bfloat16, torch.float16], "float32"),
    ],
    ids=["float32", "bfloat16", "float16", "two"],
)
def test_the_dtype_that_weights_are_stored_in(stored: list[torch.dtype], name: str, tmp_path: Path) -> None:
    folder = REFERENCE / "llama-tiny"
    weights = load_file(folder / "model.safetensors")
    kept = {key: tensor.to(stored[number % len(stored)]) for number, (key, tensor) in enumerate(weights.items())}
    # A table that is computed, never read, has no say.
    save_file(kept | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert loopscope.load(tmp_path, dtype="stored", device="cpu").info.dtype == name
    study = loopscope.analyze(tmp_path, [[1, 2, 3]], dtype="stored", device="cpu", **FAST)
    assert study.manifest["settings"]["dtype"] == name


def test_a_dtype_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"dtype must be auto, stored or one of float32, .* got 'int8'"):
        loopscope.load("demo:injected", dtype="int8")


@pytest.mark.parametrize("take", [loopscope.load, lambda model: loopscope.analyze(model, [[1]])])
def test_what_is_no_model_is_refused(take: Any) -> None:
    with pytest.raises(ConfigError, match="got None"):
        take(None)
