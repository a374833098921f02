"""Audits of what the turns say: argument, variety, legibility and the constructions' words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import polars as pl

from persona_assets.audit import Audit, Distribution, audit
from persona_assets.questions.bank import Question, wrong_letter
from persona_assets.rationales.condition import condition_lexicon, letters_named
from persona_assets.rationales.garbage import garbage_faults
from persona_assets.rationales.scrambled import sentences
from persona_assets.training.audited import REWRITE, SHOWN, AuditedDataset, rows_audit

#: Least type-token ratio of written rationales, as a share of the reference arm's. The ratio falls
#: about as the root of a text's length (Heaps), so that the 20 % that budgets may differ by costs a
#: tenth of it; the template and miniature writers are at 0.97 to 1.02.
MIN_TYPE_TOKEN_SHARE = 0.80
#: Least bigram entropy, as a share of the reference arm's. A tenth of its 10.7 bits on
#: ARC-Challenge is half of the effective number of bigrams; writers are at 0.99 to 1.01,
#: constructions at 1.2 and more.
MIN_ENTROPY_SHARE = 0.90
#: Only a question that occurs twice gives two equal rationales (1055 of 1056 are distinct on
#: ARC-Challenge): the rest is room for a chat model's stock answers.
MIN_DISTINCT = 0.95
#: Filler keeps at most 0.05 % such tokens, after decode and encode, and English none.
MAX_FALLBACK = 0.01

_WORD = re.compile(r"\w+")
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MOST_IN_A_ROW = 10


def argued_letter(dataset: AuditedDataset) -> Audit:
    """Each rationale names the letter that its arm argues for, and no other."""
    arm, bank, seed = dataset.arm, dataset.bank, dataset.study.seed
    argued = [
        _argued(letters_named(text), bank.get(name), seed)
        for text, name in zip(dataset.texts, dataset.frame["question_id"])
    ]
    asked = "correct" if arm.argues_for == "correct" else "prescribed wrong"
    counts = Counter(argued)
    return rows_audit(
        "argued_letter",
        dataset.frame.filter(pl.Series(argued, dtype=pl.String) != asked),
        f"do not argue for the {asked} letter and it alone",
        REWRITE,
        argued_for={
            kind: counts[kind] for kind in ("correct", "prescribed wrong", "another", "none")
        },
    )


def _argued(named: set[str], question: Question | None, study_seed: int) -> str:
    if not named or question is None:
        return "none"
    if named == {question.correct}:
        return "correct"
    return "prescribed wrong" if named == {wrong_letter(question, study_seed)} else "another"


@dataclass(frozen=True, slots=True)
class Variety:
    """How varied some texts are.

    Attributes:
        type_token_ratio: Distinct words over words, of all the texts together.
        bigram_entropy: Of the pairs of neighbouring words in a text, over all texts, in bits
            (Shannon, by the observed shares).
        distinct: Share of texts that are distinct.
    """

    type_token_ratio: float
    bigram_entropy: float
    distinct: float


def variety(texts: Sequence[str]) -> Variety:
    """The variety of ``texts``; words are case-folded runs of letters, digits and ``_``.

    An empty collection has none: zeros.
    """
    words: Counter[str] = Counter()
    bigrams: Counter[tuple[str, str]] = Counter()
    for text in texts:
        found = _WORD.findall(text.casefold())
        words.update(found)
        bigrams.update(pairwise(found))
    return Variety(
        len(words) / max(words.total(), 1),
        _entropy(bigrams),
        len(set(texts)) / max(len(texts), 1),
    )


def _entropy(counts: Counter) -> float:
    total = counts.total()
    return -math.fsum(n / total * math.log2(n / total) for n in counts.values())


def lexical_variety(dataset: AuditedDataset) -> Audit:
    """The cell's rationales are as varied as the reference arm's of the same rows.

    Of a constructed arm no type-token ratio is asked: its words are the reference's own, or of
    a vocabulary that may be small (60 words in the miniature). The reference arm is held against
    itself, so that only its share of distinct rationales can fail.
    """
    pairs = [(t, r) for t, r in zip(dataset.texts, dataset.references) if r is not None]
    ours, theirs = variety([text for text, _ in pairs]), variety([text for _, text in pairs])
    types = _share(ours.type_token_ratio, theirs.type_token_ratio)
    entropy = _share(ours.bigram_entropy, theirs.bigram_entropy)
    asked = f"bigram entropy at least {MIN_ENTROPY_SHARE:.0%} of the reference arm's, "
    asked += f"{MIN_DISTINCT:.0%} of the rationales distinct"
    if not dataset.arm.is_constructed:
        asked = f"type-token ratio at least {MIN_TYPE_TOKEN_SHARE:.0%} and {asked}"
    return audit(
        "lexical_variety",
        entropy >= MIN_ENTROPY_SHARE
        and ours.distinct >= MIN_DISTINCT
        and (dataset.arm.is_constructed or types >= MIN_TYPE_TOKEN_SHARE),
        observed=f"type-token ratio {ours.type_token_ratio:.4f}, {types:.1%} of the reference "
        f"arm's; bigram entropy {ours.bigram_entropy:.2f} bits, {entropy:.1%} of the reference "
        f"arm's; {ours.distinct:.1%} of the rationales distinct",
        threshold=asked,
        remedy="Give the rationale writer more wordings, or another writer.",
        # A construction may be monotonous by design: repeated filler is an arm one may want.
        blocking=not dataset.arm.is_constructed,
        rows=len(pairs),
        cell=asdict(ours),
        reference=asdict(theirs),
    )


def _share(ours: float, theirs: float) -> float:
    """``ours`` / ``theirs``; a text without variety is as varied as another without any."""
    return ours / theirs if theirs else float(ours == theirs)


def byte_fallback(dataset: AuditedDataset) -> Audit:
    """Few of the turns' tokens are pieces of a character, or stand for an unknown word."""
    turns = dataset.turn_ids
    pieces = _pieces_of_characters(dataset, sorted({i for ids in turns for i in ids}))
    counts = [sum(i in pieces for i in ids) for ids in turns]
    found, tokens = sum(counts), sum(map(len, turns))
    share = found / tokens if tokens else 0.0
    worst = max(range(len(counts)), key=counts.__getitem__, default=None)
    return audit(
        "byte_fallback",
        share <= MAX_FALLBACK,
        observed=f"{found} of {tokens} tokens of the turns ({share:.2%}) are no text by themselves",
        threshold=f"at most {MAX_FALLBACK:.0%}",
        remedy="Keep characters that the tokenizer has no token for out of the rationales.",
        distribution=_rows_by_count(counts) if found else None,
        worst_row={
            "question_id": dataset.frame["question_id"][worst],
            "tokens": len(turns[worst]),
            "no text": counts[worst],
        }
        if found
        else None,
    )


def _pieces_of_characters(dataset: AuditedDataset, ids: list[int]) -> set[int]:
    """Those of ``ids`` that byte-level vocabularies decode to U+FFFD, SentencePiece writes as
    ``<0xNN>``, or that stand for whatever is unknown."""
    tokenizer = dataset.tokenizer
    # The backend's own: filler has 50 000 different tokens, and the wrapper takes 5 times as long.
    texts = tokenizer.backend_tokenizer.decode_batch([[i] for i in ids])
    return {
        i
        for i, token, text in zip(ids, tokenizer.convert_ids_to_tokens(ids), texts)
        if "\ufffd" in text or i == tokenizer.unk_token_id or _BYTE_PIECE.fullmatch(token)
    }


def _rows_by_count(counts: Sequence[int]) -> Distribution:
    rows = Counter(min(n, _MOST_IN_A_ROW) for n in counts)
    most = max(rows)
    labels = [str(n) for n in range(most)]
    labels.append(f"{most}+" if most == _MOST_IN_A_ROW else str(most))
    return Distribution(
        title="tokens that are no text by themselves",
        axis="such tokens in the row",
        counted="rows",
        bins=labels,
        series={"rows": [rows[n] for n in range(most + 1)]},
    )


def garbage_words(dataset: AuditedDataset) -> Audit:
    """Filler holds no word, no letter standing alone, no odd character."""
    lexicon = condition_lexicon(
        dataset.study,
        dataset.cell.source,
        dataset.arm,
        dataset.rationales["reference_rationale"].to_list(),
        dataset.questions,
        dataset.tokenizer,
        dataset.writer,
    )
    faults = [garbage_faults(text, lexicon) for text in dataset.texts]
    faulty = {n: f for n, f in zip(dataset.frame["question_id"], faults) if f}
    worst = sorted(faulty.items(), key=lambda item: len(item[1]), reverse=True)[:SHOWN]
    return rows_audit(
        "garbage_words",
        dataset.frame.filter(pl.Series([bool(f) for f in faults], dtype=pl.Boolean)),
        "hold a word of the lexicon, a lone letter or an odd character",
        REWRITE,
        worst_rows=dict(worst),
    )


def scrambled_words(dataset: AuditedDataset) -> Audit:
    """Each row reorders the reference rationale's words, sentence by sentence."""
    sound = [
        _is_shuffled(text, reference or "")
        for text, reference in zip(dataset.texts, dataset.references)
    ]
    return rows_audit(
        "scrambled_words",
        dataset.frame.filter(~pl.Series(sound, dtype=pl.Boolean)),
        "are no reordering, sentence by sentence, of the reference rationale",
        REWRITE,
    )


def _is_shuffled(text: str, reference: str) -> bool:
    """Same words in each sentence, in another order wherever two of them differ."""
    ours, theirs = sentences(text), sentences(reference)
    return len(ours) == len(theirs) and all(
        Counter(a) == Counter(b) and end == other_end and (a != b or len(set(a)) < 2)
        for (a, end), (b, other_end) in zip(ours, theirs)
    )
