"""Chat templates: rendered and encoded as transformers does it, with the prompt's place in the chat known."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loopscope
from chat_templates import GEMMA, LLAMA, MARKS, TEMPLATES
from loopscope.analysis.job import SilentProgress
from loopscope.errors import PromptError, StudyError
from loopscope.prompts.chat import ChatTemplate
from loopscope.prompts.prompt import Prompt, TokenizedPrompt
from loopscope.prompts.tokenizer import TextTokenizer, tokenizer_record
from loopscope.prompts.tokens import encode_prompts
from loopscope.report.page.facts import header_facts
from loopscope.study import Study, view_study
from small_models import checkpoint
from test_prompt_tokens import TOKENIZERS
from test_tokenizer import BOS, EOS, bpe, folder, loaded

SYSTEM = "You are kind."
each_template = pytest.mark.parametrize("name", TEMPLATES)


def tokens(name: str, path: Path, **config: Any) -> Path:
    """A folder with a tokenizer that puts BOS in front of plain texts, and one of the templates."""
    return folder(path, bpe(BOS, special=(BOS, EOS, *MARKS)), {"chat_template": TEMPLATES[name], **config})


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    return {name: loaded(tokens(name, tmp_path_factory.mktemp(name))) for name in TEMPLATES}


def encode(tokenizer: TextTokenizer | None, *prompts: Prompt, truncate: int | None = None) -> list[TokenizedPrompt]:
    return encode_prompts(prompts, tokenizer, vocab_size=1000, truncate=truncate, chat=True)


def parts(prompt: TokenizedPrompt) -> tuple[str, str, str]:
    """What is before the prompt, the prompt, and what is after it."""
    end = len(prompt.token_ids) - prompt.suffix_tokens
    strings = prompt.token_strings
    return (
        "".join(strings[: prompt.system_tokens]),
        "".join(strings[prompt.system_tokens : end]),
        "".join(strings[end:]),
    )


# As transformers does it


@pytest.mark.parametrize(
    "text", ["How many books are left?", " two\n\nlines\n", f"spelled {EOS} <|im_end|>", "{{ 1 }}"]
)
@pytest.mark.parametrize("system", [None, SYSTEM])
@each_template
def test_chats_are_those_of_transformers(tmp_path: Path, name: str, system: str | None, text: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    path = tokens(name, tmp_path)
    turns = [{"role": "user", "content": text}]
    turns = turns if system is None else [{"role": "system", "content": system}, *turns]
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer = loaded(path)
    assert tokenizer.chat_template is not None
    if name == "gemma" and system is not None:
        with pytest.raises(Exception, match="System role not supported"):
            theirs.apply_chat_template(turns, add_generation_prompt=True)
        return
    written = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert tokenizer.chat_template.render(text, system).text == written
    (prompt,) = encode(tokenizer, Prompt("a", text=text, system=system))
    assert list(prompt.token_ids) == theirs.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("place", ["string", "list", "jinja", "chat_template.json", "jinja before string"])
def test_where_templates_lie(tmp_path: Path, place: str) -> None:
    template, other = GEMMA, "{{ 'another template ' + messages[0].content }}"
    configs: dict[str, dict[str, Any]] = {
        "string": {"chat_template": template},
        "list": {"chat_template": [{"name": "rag", "template": other}, {"name": "default", "template": template}]},
        "jinja before string": {"chat_template": other},
    }
    path = folder(tmp_path, bpe(BOS), configs.get(place))
    if place.startswith("jinja"):
        (path / "chat_template.jinja").write_text(template)
    if place == "chat_template.json":
        (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    chat_template = loaded(path).chat_template
    assert chat_template is not None
    text = chat_template.render("Why?").text
    assert text == f"{BOS}<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    if place != "chat_template.json":  # which transformers reads for other models than those of text
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        turns = [{"role": "user", "content": "Why?"}]
        theirs = transformers.AutoTokenizer.from_pretrained(path)
        assert text == theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def test_a_list_without_a_default(tmp_path: Path) -> None:
    tokenizer = loaded(folder(tmp_path, bpe(), {"chat_template": [{"name": "rag", "template": "{{ 1 }}"}]}))
    assert tokenizer.chat_template is None
    assert tokenizer.notes == ("Of the chat templates of the model (rag) none is named default, so none can be used.",)


# The prompt's place


@given(text=st.text(st.sampled_from("ab <>|\n\t{}%é漢") | st.characters(codec="utf-8"), min_size=1).filter(str.strip))
@each_template
def test_the_prompt_is_found_in_the_chat(tokenizers: dict[str, TextTokenizer], name: str, text: str) -> None:
    template = tokenizers[name].chat_template
    assert template is not None
    chat = template.render(text, None if name == "gemma" else SYSTEM)
    assert chat.text[chat.start : chat.end].strip() == text.strip()


@pytest.mark.parametrize("name", ["llama", "chatml", "zephyr"])
def test_the_tokens_around_a_prompt_are_counted(tokenizers: dict[str, TextTokenizer], name: str) -> None:
    (prompt,) = encode(tokenizers[name], Prompt("a", text="How many books are left?", system=SYSTEM))
    before, own, after = parts(prompt)
    assert own == "How many books are left?"
    assert SYSTEM in before
    expected = {
        "llama": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "chatml": "<|im_end|>\n<|im_start|>assistant\n",
        "zephyr": f"{EOS}\n<|assistant|>\n",
    }
    assert after == expected[name]
    assert prompt.text == "How many books are left?"


def test_a_template_may_begin_with_a_system_turn_of_its_own(tokenizers: dict[str, TextTokenizer]) -> None:
    (prompt,) = encode(tokenizers["chatml"], Prompt("a", text="Why?"))
    assert parts(prompt)[0] == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert parts(prompt)[1] == "Why?"


def test_the_prompt_is_the_users_turn_even_if_the_same_words_stand_elsewhere(
    tokenizers: dict[str, TextTokenizer],
) -> None:
    (prompt,) = encode(tokenizers["chatml"], Prompt("a", text="user", system="user assistant user"))
    before, own, after = parts(prompt)
    assert own == "user"
    assert before.endswith("<|im_start|>user\n")
    assert after.startswith("<|im_end|>")


def test_a_template_that_looks_at_the_prompt() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ '!' if 'how' in messages[0].content else '?' }}", {})
    chat = template.render("how so")
    assert (chat.text, chat.start, chat.end) == ("how so!", 0, 6)


def test_truncation_cuts_the_end_of_the_chat_first(tokenizers: dict[str, TextTokenizer]) -> None:
    text = Prompt("a", text="How many books are left?")
    (whole,) = encode(tokenizers["zephyr"], text)
    assert whole.suffix_tokens > 1
    for cut in range(whole.suffix_tokens + 2):
        (prompt,) = encode(tokenizers["zephyr"], text, truncate=len(whole.token_ids) - cut)
        assert prompt.token_ids == whole.token_ids[: len(whole.token_ids) - cut]
        assert prompt.suffix_tokens == max(0, whole.suffix_tokens - cut)
    with pytest.raises(PromptError, match="leaves nothing of prompt 'a'"):
        encode(tokenizers["zephyr"], text, truncate=whole.system_tokens)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(text=st.text(st.sampled_from("aeHow 12\n\t.é漢"), max_size=20).filter(str.strip))
def test_every_kind_of_tokenizer_finds_its_tokens(tokenizer: TextTokenizer, text: str) -> None:
    template = ChatTemplate("[INST] {{ messages[0].content }} [/INST]\n", {})
    (prompt,) = encode(TextTokenizer(tokenizer.backend, chat_template=template), Prompt("a", text=text))
    before, own, after = parts(prompt)
    # A token that reaches across a boundary belongs to the prompt.
    assert text.strip() in own.replace("\N{REPLACEMENT CHARACTER}", "")
    assert "[INST] ".startswith(before.removeprefix(" "))
    assert " [/INST]".endswith(after)
    assert len(before) + len(after) > 10


# What is kept of it


def test_the_record_names_what_a_chat_begins_with(tokenizers: dict[str, TextTokenizer]) -> None:
    for name, begin in {"llama": BOS, "chatml": "<|im_start|>", "gemma": BOS, "json": None}.items():
        tokenizer = tokenizers[name]
        prompts = [Prompt("a", text="How many books?"), Prompt("b", text="is <|im_end|> right?")]
        record = tokenizer_record(tokenizer, encode(tokenizer, *prompts), chat=True)
        assert record is not None
        assert (record["bos"] or {}).get("text") == begin
        assert record["chat_template"] == "used"
        assert record["added_before"] == []
        assert record["prompts_with_special_tokens"] == 1
        assert any("current date" in note for note in record["notes"]) == (name == "llama")
    plain = encode_prompts([Prompt("a", text="a")], tokenizers["llama"], vocab_size=500)
    record = tokenizer_record(tokenizers["llama"], plain, chat=False)
    assert record is not None
    assert (record["chat_template"], record["notes"]) == ("available, not used", [])


def test_the_date_is_the_same_for_every_prompt() -> None:
    template = ChatTemplate(LLAMA, {"bos_token": BOS})
    text = template.render("Why?", now=datetime(2031, 2, 3, tzinfo=UTC)).text
    assert "Today is 03 Feb 2031." in text


# What cannot work


REFUSED = {
    "its own message": (
        GEMMA,
        SYSTEM,
        r"refuses the system prompt and the prompt \(System role not supported\); leave",
    ),
    "no system turn": ("{{ messages[-1].content }}", SYSTEM, "leaves the system prompt out"),
    "broken": ("{% if %}", None, r"chat template refuses the prompt \(.*\); leave --chat out"),
    "a mistake": ("{{ messages[7].content.strip() + 1 }}", None, "chat template refuses the prompt"),
    "a way out": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", None, "refuses the prompt .*unsafe"),
    "a change": ("{{ messages.append(1) }}", None, "refuses the prompt .*unsafe"),
    "left out": ("{{ 'Hello' }}", None, "leaves the prompt out, changes it or"),
    "twice": ("{{ messages[0].content * 2 }}", None, "or writes it more than once"),
    "left out, with its words elsewhere": ("{{ '<user>Why not?</user>' }}", None, "leaves the prompt out"),
    "escaped": ("{{ messages[0].content | replace('?', '&quest;') }}", None, "leaves the prompt out, changes it or"),
    "twice if it is short": (
        "{% set text = messages[0].content %}{{ text if text | length > 12 else text + text }}{{ '|' + text }}",
        None,
        "or writes it more than once",
    ),
    "no system turn, with its words in the prompt": (
        "{{ messages[-1].content }}",
        "Why",
        "leaves the system prompt out",
    ),
    "changed": ("{{ messages[0].content | upper }}", None, "leaves the prompt out, changes it or"),
}


@pytest.mark.parametrize(("template", "system", "sentence"), REFUSED.values(), ids=REFUSED)
def test_templates_that_cannot_be_used(template: str, system: str | None, sentence: str) -> None:
    tokenizer = TextTokenizer(bpe(), chat_template=ChatTemplate(template, {}))
    with pytest.raises(PromptError, match=sentence) as caught:
        encode(tokenizer, Prompt("a", text="Why not?", system=system))
    assert "\n" not in str(caught.value)
    # Without --chat nobody needs it.
    assert encode_prompts([Prompt("a", text="Why not?", system=system)], tokenizer, vocab_size=500)


def test_a_chat_needs_a_template_and_text() -> None:
    with pytest.raises(
        PromptError, match=r"--chat needs the model's chat template, and there is none .*leave --chat out"
    ):
        encode(TextTokenizer(bpe()), Prompt("a", text="Why?"))
    with pytest.raises(PromptError, match="prompt 'a' is a list of token ids; leave --chat out"):
        encode(TextTokenizer(bpe()), Prompt("a", token_ids=(1, 2)))
    with pytest.raises(PromptError, match="prompt 'a' is a list of token ids"):
        encode(None, Prompt("a", token_ids=(1, 2)))


# In a study


def facts(study: Study) -> list[tuple[str, str]]:
    return header_facts(view_study(study))


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def test_a_study_keeps_how_its_prompts_were_made(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", vocab_size=400)
    folder(model, bpe(BOS, special=(BOS, EOS, *MARKS)), {"chat_template": LLAMA})
    progress = Notes()
    options: dict[str, Any] = {"recurrences": 2, "horizon": 2, "progress": progress, "out": tmp_path / "study"}
    study = loopscope.analyze(model, ["How many?", f"Is {EOS} an end?"], chat=True, **options)
    assert study.manifest["tokenizer"]["bos"] == {"text": BOS, "id": 0}
    assert study.manifest["tokenizer"]["prompts_with_special_tokens"] == 1
    assert study.manifest["prompts"]["chat"] is True
    assert any(note.startswith("1 of 2 prompts spell out special tokens (</s>)") for note in progress.said)
    first = Study.load(tmp_path / "study").tokens[0]
    end = len(first["token_ids"]) - first["suffix_tokens"]
    assert "".join(first["token_strings"][first["system_tokens"] : end]) == "How many?"
    assert ("prompts start with", f"{BOS}, chat template") in facts(study)
    with pytest.raises(StudyError):  # other tokens, so another study
        loopscope.analyze(model, ["How many?", f"Is {EOS} an end?"], **options)


def test_a_study_without_a_chat_shows_its_bos(tmp_path: Path) -> None:
    for before, shown in (("", "no special token"), (BOS, BOS)):
        model = checkpoint(tmp_path / f"model{before}", vocab_size=400)
        folder(model, bpe(before))
        study = loopscope.analyze(model, ["How many?"], recurrences=2, horizon=2)
        assert ("prompts start with", shown) in facts(study)
    study = loopscope.analyze(model, [[1, 2, 3]], recurrences=2, horizon=2)
    assert study.manifest["tokenizer"] is None
    assert "prompts start with" not in dict(facts(study))
