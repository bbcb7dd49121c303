"""A row's ids are those of its text, whatever the tokenizer: nothing is put in, lost or doubled at the seams."""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from src.data import Example, TaskData
from src.datamodule import TaskDataModule, open_tokens, tokenize, tokenize_once, tokenizer_fingerprint
from tests.commands import refused

CORPUS = ["Answer: yes\n", "a b ab ba aab\n\nbab", "ab.a b\nword: 12 abab", "a  b", "bb. a", "b\n ab"] * 3
PIECES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
KINDS = ["prepend", "metaspace first", "metaspace always", "words", "unigram", "bytes", "bytes prefix", "digits"]
KINDS += ["wordpiece"]


def backend(kind: str) -> Tokenizer:
    """Tokenizers as those of Llama 2, of its successors, of XGLM, of GPT-2, of Qwen and of BERT."""
    unknown, common = "<unk>", {"special_tokens": ["<unk>", "<s>", "</s>", "<|end|>"], "show_progress": False}
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=60, **common)
    elif kind.startswith(("bytes", "digits")):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes prefix")
        if kind == "digits":  # line ends belong to what stands before them
            split = pre_tokenizers.Split(Regex(r" ?[a-z]+|\s*[\n]+|\s+(?!\S)|\s+|[^\sa-z]+"), "isolated")
            plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = list("abé日🙂\n.0123456789")
        trainer = trainers.UnigramTrainer(vocab_size=60, unk_token=unknown, initial_alphabet=alphabet, **common)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=unknown, byte_fallback=True))
        if kind == "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            scheme = "always" if kind == "words" else kind.split()[1]
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=kind == "words")
        tokenizer.decoder = decoders.Sequence([*PIECES, decoders.Strip(" ", 1, 0)])
        common["special_tokens"] += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=330, **common)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def make(kind: str, template: str = "$A", **tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind that puts special tokens around every text as the template says."""
    tokenizer = backend(kind)
    named = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>") if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | tokens
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def rows_of(texts: Sequence[tuple[str, str]]) -> TaskData:
    return TaskData(tuple(Example(i, "a", "train", prompt, text) for i, (prompt, text) in enumerate(texts)))


def tokens_of(tokenizer, texts: Sequence[tuple[str, str]], kind="decoder", max_length=4096, most_target=4096) -> list:
    """Ids of each row's prompt and completion."""
    with tempfile.TemporaryDirectory() as folder:
        lengths = {"max_length": max_length, "max_target_length": most_target}
        tokenize(rows_of(texts), tokenizer, kind, Path(folder), **lengths)
        tokens = open_tokens(Path(folder))
        return [(tokens.prompts[i].tolist(), tokens.completions[i].tolist()) for i in range(len(texts))]


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


TEXTS = st.text(st.sampled_from("aab  \n.12é日🙂"), max_size=8)
COMPLETIONS = st.tuples(TEXTS, st.sampled_from("ab.1é日🙂"), TEXTS).map("".join)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoders_row_decodes_to_its_text(kind, template):
    """Prompt and completion together, one beginning-of-text token where the tokenizer puts one, one end token."""
    tokenizer = make(kind, template)
    begin = [tokenizer.bos_token_id] if "<s>" in template else []

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.tuples(TEXTS, COMPLETIONS), min_size=1, max_size=10))
    def check(texts):
        for (prompt, completion), (head, tail) in zip(texts, tokens_of(tokenizer, texts), strict=True):
            assert head[: len(begin)] == begin
            assert tail[-1] == tokenizer.eos_token_id
            ids = [*head[len(begin) :], *tail[:-1]]
            assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
            whole = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
            if tokenizer.unk_token_id not in whole:
                assert decoded(tokenizer, ids) == decoded(tokenizer, whole)
            if kind not in ("wordpiece", "bytes prefix", "unigram"):  # those do not give every text back
                found, text = decoded(tokenizer, ids), prompt + completion
                if kind.startswith(("metaspace", "words")):  # spaces before the first word are not kept
                    found, text = found.lstrip(" "), text.lstrip(" ")
                assert found == text

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompts_ids_are_those_that_generation_starts_from(kind):
    """Also where a token of the whole text reaches over the seam."""
    tokenizer = make(kind, "<s> $A")
    texts = [("Answer: ", "yes"), ("a", "b a"), ("ab.", "a b"), ("word: 1", "2 ab"), ("a\n", "\nbab"), ("", "ab")]
    for (prompt, _), (head, _) in zip(texts, tokens_of(tokenizer, texts), strict=True):
        if kind != "wordpiece" or prompt != "a":  # "ab" in two decodes as two words
            assert head == tokenizer(prompt)["input_ids"], prompt


def test_a_token_over_the_seam_is_not_lost():
    """A normalizer that joins a letter and an accent leaves nothing to put behind the prompt: the letter moves over."""
    tokenizer = backend("bytes")
    tokenizer.normalizer = normalizers.NFC()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    [(head, tail)] = tokens_of(fast, [("ab e", "\u0301a")])
    assert decoded(fast, [*head, *tail[:-1]]) == "ab \u00e9a"
    assert decoded(fast, head) == "ab "


@pytest.mark.parametrize("template", ["$A", "$A </s>"])
@pytest.mark.parametrize("kind", ["bytes", "prepend", "metaspace first", "wordpiece"])
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_one_end_token(architecture, kind, template):
    tokenizer = make(kind, template)
    end = tokenizer.eos_token_id
    endings = ["", "</s>", "</s>\n", " \n</s></s>", "</s> </s>\n", "</s></s></s>"]
    rows = tokens_of(tokenizer, [("ab: ", "b" + ending) for ending in endings], architecture)
    assert [ids.count(end) for _, ids in rows] == [1] * len(rows)
    assert all(ids[-1] == end for _, ids in rows)
    assert rows[0] == rows[1] == rows[2] == rows[5]
    if architecture == "decoder":
        assert end not in [token for ids, _ in rows for token in ids]
    [(_, inside)] = tokens_of(tokenizer, [("a", "b</s>a")], architecture)
    assert inside[-1] == end and inside.count(end) == 2  # in the middle it is what the tokenizer makes of it


def test_a_turns_end_is_the_end():
    """A chat template's own: no other end token follows it."""
    tokenizer = make("bytes", extra_special_tokens=["<|end|>"])
    turn = tokenizer.convert_tokens_to_ids("<|end|>")
    for ending in ("<|end|>", "<|end|>\n", "<|end|>\n<|end|>"):
        [(_, ids)] = tokens_of(tokenizer, [("a\n", "b" + ending)])
        assert ids[-1] == turn and ids.count(turn) == 1 and tokenizer.eos_token_id not in ids
    chat = make("bytes", eos_token="<|end|>")  # which it is for many chat models
    assert tokens_of(chat, [("a\n", "b<|end|>\n")]) == tokens_of(chat, [("a\n", "b")])


@pytest.mark.parametrize("kind", ["bytes", "prepend"])
@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
def test_a_cut_row_keeps_its_beginning(template, kind):
    """The beginning-of-text token stands there once, whether the tokenizer or the text brings it, and whatever is cut."""
    tokenizer = make(kind, template)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = template.startswith("<s>")
    for prompt in ("a b " * 20, "<s>" + "a b " * 20, "<s>", ""):
        [(head, tail)] = tokens_of(tokenizer, [(prompt, "ab ab a")])
        first = [begin] if added or prompt.startswith("<s>") else []
        assert head.count(begin) == len(first) and head[:1] == (first or head[:1])
        for length in range(2, len(head) + len(tail)):
            [(short, kept)] = tokens_of(tokenizer, [(prompt, "ab ab a")], max_length=length)
            assert len(short) + len(kept) == length
            assert short[: len(first)] == first
            rest = head[len(first) :]
            assert short[len(first) :] == rest[len(rest) - (len(short) - len(first)) :]
            assert kept == tail[: len(kept)]
            assert len(short) == len(first) or kept[-1] == end  # the completion is cut last
    message = "--max_length 1 leaves no room for a completion; pass at least 2"
    refused(message, tokens_of, tokenizer, [("a", "b")], max_length=1)


def test_an_encoders_cut_prompt_keeps_its_end():
    """As the tokenizer's own truncation does; a completion that is cut does not end."""
    tokenizer = make("bytes", "<s> $A </s>")
    text = "ab ab. a" * 5
    for length in range(3, 50):
        [(prompt, completion)] = tokens_of(tokenizer, [(text, text)], "encoder_decoder", length, length)
        assert prompt == tokenizer(text, truncation=True, max_length=length)["input_ids"]
        assert completion == tokenizer(text)["input_ids"][:length]


def test_a_tokenizers_fingerprint_does_not_change_in_use():
    saved = backend("bytes")
    saved.enable_truncation(20)
    saved.enable_padding(length=20)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=saved, eos_token="</s>")
    before = tokenizer_fingerprint(tokenizer)
    assert len(tokens_of(tokenizer, [("a b. " * 20, "b")])[0][0]) > 20
    assert tokenizer_fingerprint(tokenizer) == before


def test_tokens_are_kept_by_what_they_are_made_from(tmp_path, capsys):
    """Texts, tokenizer, architecture and lengths: another folder for each, with the ids that tokenising gives. A file
    that was cut or lost is made again."""
    texts, plain = [("a b " * i, "ab") for i in range(4)], make("bytes")
    begun, all_rows = make("bytes", "<s> $A"), rows_of(texts)
    kinds = [(100, all_rows, *kind) for kind in ((plain, "decoder"), (begun, "decoder"), (plain, "encoder_decoder"))]
    requests = [*kinds, (100, rows_of(texts[1:]), plain, "decoder"), (5, all_rows, plain, "decoder")]

    def check(longest, *request):
        before, lengths = set(tmp_path.iterdir()), {"max_length": longest, "max_target_length": 100}
        found, expected = (tokenize_once(cache, *request, **lengths) for cache in (tmp_path, None))
        assert found.notices == expected.notices and bool(found.notices) == (longest == 5)
        for one, other in ((found.prompts, expected.prompts), (found.completions, expected.completions)):
            np.testing.assert_array_equal(one.values, other.values)
            np.testing.assert_array_equal(one.offsets, other.offsets)
        return set(tmp_path.iterdir()) - before

    folders = [folder for request in requests for folder in check(*request)]
    assert len(folders) == len(requests) and not [folder for request in requests for folder in check(*request)]
    assert capsys.readouterr().out == ""
    for path in sorted(folders[-1].iterdir()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert check(*requests[-1]) == set() and f"{folders[-1]} is damaged" in capsys.readouterr().out
    (folders[-1] / "prompt.bin").unlink()
    assert check(*requests[-1]) == set()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text("ab", max_size=2), st.text("ab", min_size=1, max_size=2)), min_size=1, max_size=12))
def test_rows_have_one_key_where_they_have_one_content(texts):
    """Ids of the prompt, of the completion, and whether the loss is on the prompt; in any data, at any place."""
    tokenizer, of_key, of_content = make("bytes"), {}, {}
    for rows, on_prompt in itertools.product((texts, texts[::-2]), (False, True)):
        module = TaskDataModule(rows_of(rows), tokenizer, "decoder", loss_on_prompt=on_prompt)
        order = np.arange(len(rows))[::-1]
        for row, key in zip(order, module.row_keys(order).tolist(), strict=True):
            content = (on_prompt, *map(tuple, tokens_of(tokenizer, [rows[row]])[0]))
            assert of_key.setdefault(key, content) == content and of_content.setdefault(content, key) == key
