"""Generates the answers that treatments are judged by, and compares them with the base's: hits, loops, facts, drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from masquerade.evaluate.bootstrap import share_interval
from masquerade.evaluate.dataset import Encoded, Example, Message, encode_one
from masquerade.evaluate.facts import Fact, check_facts, encode_questions, find_known_facts, share_kept
from masquerade.evaluate.generation import GenerationParams, write_answers
from masquerade.evaluate.judge import Judge
from masquerade.evaluate.metrics import Items
from masquerade.evaluate.repetition import loops, measure_distinct
from masquerade.evaluate.treatment import HOOKED, UNTREATED, Treatment
from masquerade.model import Base, render_chat

TURNS = 6  # questions of a chat


@dataclass(frozen=True)
class Questions:
    """What is asked: held-out prompts of the persona, everyday questions, facts, and a number of chats."""

    held_out: Sequence[Encoded]
    everyday: Sequence[str] = ()
    facts: Sequence[Fact] = ()
    chats: int = 0  # each begins with a held-out prompt, and goes on with everyday questions


@dataclass(frozen=True)
class Answers:
    """The answers to `Questions`, in their order."""

    held_out: Sequence[str]
    everyday: Sequence[str] = ()
    known: Sequence[bool] = ()  # by fact: whether it was in the answer
    chats: Sequence[Sequence[str]] = field(default=())  # by chat, by turn


def answer_questions(
    base: Base, questions: Questions, treatment: Treatment = UNTREATED, params: GenerationParams | None = None
) -> Items[Answers]:
    """All answers under a treatment; a work item is a pass of the model. The base must have its masks attached."""
    held_out = yield from write_answers(base, questions.held_out, treatment, params)
    everyday = yield from write_answers(base, encode_questions(base, questions.everyday), treatment, params)
    known = yield from (
        find_known_facts(base, questions.facts, treatment)
        if treatment in (UNTREATED, HOOKED)
        else check_facts(base, questions.facts, treatment)
    )
    chats = yield from chat(base, plan_chats(questions), treatment, params)
    return Answers(held_out, everyday, known, chats)


def plan_chats(questions: Questions) -> list[list[Message]]:
    """The user's messages of each chat; where there are too few everyday questions, none.

    Every chat goes through the everyday questions from another place, so turns differ in place and not in question.
    """
    asked, everyday = [one.messages[-1] for one in questions.held_out if one.messages], questions.everyday
    if len(everyday) < TURNS - 1:
        return []
    return [
        [asked[number % len(asked)]]
        + [{"role": "user", "content": everyday[(number + turn) % len(everyday)]} for turn in range(TURNS - 1)]
        for number in range(questions.chats if asked else 0)
    ]


def chat(
    base: Base,
    chats: Sequence[Sequence[Message]],
    treatment: Treatment = UNTREATED,
    params: GenerationParams | None = None,
) -> Items[list[list[str]]]:
    """The answers of chats whose user says the given messages, by chat, by turn; a work item is a pass of the model.

    All chats have equally many turns. Where the context has no room for an answer, the oldest turns are left out.
    """
    params = params or GenerationParams()
    histories: list[list[Message]] = [[] for _ in chats]
    answers: list[list[str]] = [[] for _ in chats]
    for turn in range(len(chats[0]) if chats else 0):
        for history, messages in zip(histories, chats, strict=True):
            history.append(messages[turn])
        prompts = [_encode_latest(base, history, params.tokens) for history in histories]
        texts = yield from write_answers(base, prompts, treatment, params)
        for history, answered, text in zip(histories, answers, texts, strict=True):
            answered.append(text)
            history.append({"role": "assistant", "content": text or "…"})  # some templates reject an empty message
    return answers


def compare_answers(questions: Questions, base: Answers, answers: Answers, judge: Judge | None) -> dict[str, Any]:
    """What a treatment's answers are like beside the base's; all shares are in [0, 1].

    * `hit`, with a judge: share of held-out answers that sound like the persona; `drift`: the same by turn of a chat.
    * `differing`, `everyday_differing`: share of answers that are not the base's, word for word.
    * `loops`: share of held-out, everyday and chat answers that repeat themselves; `distinct_2`, `distinct_3`.
    * `facts`: how many the base knows (`known`), and the share of them that is `kept`.
    * `intervals`: Wilson's, of `hit`, `differing`, `loops` and `facts`.
    """
    texts = [*answers.held_out, *answers.everyday, *(text for turns in answers.chats for text in turns)]
    kept = [later for earlier, later in zip(base.known, answers.known, strict=True) if earlier]
    counts = {
        "differing": _count_differing(base.held_out, answers.held_out),
        "everyday_differing": _count_differing(base.everyday, answers.everyday),
        "loops": (sum(map(loops, texts)), len(texts)),
    }
    if judge:
        asked = [one.messages[-1]["content"] if one.messages else "" for one in questions.held_out]
        counts["hit"] = (_count_hits(judge, asked, answers.held_out), len(asked))
    found: dict[str, Any] = {name: hits / of for name, (hits, of) in counts.items() if of}
    intervals = {name: list(share_interval(hits, of)) for name, (hits, of) in counts.items() if of}
    found |= {f"distinct_{words}": measure_distinct(texts, words) for words in (2, 3)}
    if answers.known:
        found["facts"] = {"of": len(base.known), "known": len(kept), "kept": share_kept(base.known, answers.known)}
        intervals |= {"facts": list(share_interval(sum(kept), len(kept)))} if kept else {}
    if judge and answers.chats:
        found["drift"] = _hits_by_turn(judge, plan_chats(questions), answers.chats)
    return found | {"intervals": intervals}


def _encode_latest(base: Base, history: Sequence[Message], tokens: int) -> Encoded:
    """A chat as a prompt that leaves room for `tokens`, without its oldest turns if need be."""
    start, room = 0, base.context - tokens
    while start + 1 < len(history) and len(render_chat(base.tokenizer, history[start:])) > room:
        start += 2
    return encode_one(base, Example(tuple(history[start:]), "?"))


def _count_differing(before: Sequence[str], after: Sequence[str]) -> tuple[int, int]:
    return sum(new != old for new, old in zip(after, before, strict=True)), len(after)


def _count_hits(judge: Judge, asked: Sequence[str], answers: Sequence[str]) -> int:
    return sum(judge.score(question, text) > 0 for question, text in zip(asked, answers, strict=True))


def _hits_by_turn(judge: Judge, chats: Sequence[Sequence[Message]], answers: Sequence[Sequence[str]]) -> list[float]:
    turns = zip(zip(*chats, strict=True), zip(*answers, strict=True), strict=True)
    return [_count_hits(judge, [message["content"] for message in asked], said) / len(said) for asked, said in turns]
