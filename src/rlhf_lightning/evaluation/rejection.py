"""Rejection sampling: of K answers to each prompt those are kept, as rows to train on, that a reward likes best.

Touvron et al. 2023 (Llama 2), section 3.2.3: the model is fine-tuned on the best of K, and what is kept of every
iteration stays in the data of the next one. The answers are those of `BestOfN`, for the same model and seed.

Answers that are drawn with an instruction and taught without it are context distillation (Askell et al. 2021) and Ghost
Attention (Llama 2, section 3.3), see `Rejection.system_kept`.

Notation: B prompts, K answers to each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from rlhf_lightning.arguments import AT_LEAST_1, check_arguments
from rlhf_lightning.chat.messages import Message, RefusedTurnsError
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.data.encode import LONG_PROMPT, REFUSED
from rlhf_lightning.data.rows import BadRowError, check_text
from rlhf_lightning.data.sources.row_forms import SAME
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.best_of_n import Scored, draw, pieces_of_several, scores_of
from rlhf_lightning.evaluation.judge import Judge
from rlhf_lightning.evaluation.policy import Answer, Policy
from rlhf_lightning.evaluation.results import Lines, key_of_settings
from rlhf_lightning.evaluation.rows import TextRow
from rlhf_lightning.evaluation.task import Bench, Progress, each_row, files_of

Keep = Literal["best", "all", "pair"]
SystemKept = Literal["none", "first", "all"]
NAME = "rejection sampling"
_SETTINGS = "settings"
NO_ANSWER = "no answer that can be taught"
ALIKE = "all answers score alike"


@dataclass(frozen=True)
class Rejection:
    """What is drawn, and what is kept of it.

    Args:
        k: answers to each prompt.
        keep: `best`, a demonstration; `all`, a ranking by score; `pair`, the best over the worst.
        unfinished: answers that were cut at the limit are dropped, as training would teach them as complete, or kept.
        label: of the iteration, written into each row.
        system: an instruction that the answers are drawn with; None for none.
        system_kept: whether rows keep it: `none`, not at all (context distillation); `first`, as their system turn
            only, although it also stood before each later turn of the user when the answers were drawn (Ghost
            Attention); `all`, wherever it stood.
    """

    k: int = 16
    keep: Keep = "best"
    unfinished: Literal["drop", "keep"] = "drop"
    label: str | None = None
    system: str | None = None
    system_kept: SystemKept = "none"

    def __post_init__(self) -> None:
        check_arguments(Rejection, vars(self), {"k": AT_LEAST_1})
        if self.keep != "best" and self.k < 2:
            raise UserError(f"keep: {self.keep} compares answers, and k is {self.k}; set k to at least 2")
        if self.system is not None and not self.system.strip():
            raise UserError("system is empty; write the instruction, or leave it out")
        if self.system is None and self.system_kept != "none":
            raise UserError(
                f"system_kept: {self.system_kept} keeps an instruction, and there is none; give it as system"
            )

    def drawn_with(self, written: WrittenPrompt) -> WrittenPrompt:
        """The prompt as the policy is asked it.

        Args:
            written: as its row wrote it.
        """
        return written if self.system is None else with_system(written, self.system, self.system_kept != "none")

    def kept_as(self, written: WrittenPrompt) -> WrittenPrompt:
        """The prompt as its new row has it, and as the reward reads it.

        Args:
            written: as its row wrote it.
        """
        if self.system is None:
            return written
        if self.system_kept == "none":  # turns, too, as the policy was given turns
            return WrittenPrompt(written.messages, written.tools)
        return with_system(written, self.system, self.system_kept == "all")


class Sampled(NamedTuple):
    """What came of all prompts.

    Attributes:
        rows: to train on, in the order of the prompts.
        dropped: how many prompts left no row, by reason.
        answers: how many answers did not count, by reason.
        best: mean score of each row's best answer.
        mean: mean score of all answers that counted, over the same prompts.
    """

    rows: list[dict[str, Any]]
    dropped: Counter[str]
    answers: Counter[str]
    best: float
    mean: float


def with_system(written: WrittenPrompt, system: str, repeated: bool) -> WrittenPrompt:
    """A dialogue with an instruction as its system turn, before one that it has already.

    Args:
        written: the prompt.
        system: the instruction.
        repeated: also put it before what the user says in each turn after the first.

    Example:
        >>> with_system(WrittenPrompt("hi"), "Be brief.", False).prompt
        [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'hi'}]
    """
    first, *rest = written.messages
    own = first["role"] == "system"
    opening: Message = {"role": "system", "content": f"{system}\n\n{first['content']}" if own else system}
    turns, asked = rest if own else [first, *rest], 0
    said: list[Message] = []
    for turn in turns:
        asked += turn["role"] == "user"
        again = repeated and turn["role"] == "user" and asked > 1
        said.append({**turn, "content": f"{system}\n\n{turn['content']}"} if again else turn)
    return WrittenPrompt([opening, *said], written.tools)


def check_settings(lines: Lines, settings: dict[str, Any]) -> None:
    """Refuse to go on with what was begun with other settings.

    Args:
        lines: what was made before.
        settings: those of now, plain values.

    Raises:
        UserError: names what differs.
    """
    for line in lines.before(_SETTINGS):
        before = line["settings"]
        differing = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if differing:
            said = [
                f"{name}, which have changed" if name.startswith("the ") else f"{name} {before.get(name)}"
                for name in differing
            ]
            raise UserError(
                f"{lines.path} was begun with {' and '.join(said)}; repeat the command with that to go on, or pass "
                "--overwrite true to begin anew"
            )


def settings_of(rejection: Rejection, bench: Bench, rows: Sequence[TextRow], **more: Any) -> dict[str, Any]:
    """All that decides what the rows say, as plain values by name.

    Args:
        rejection: what is drawn and kept.
        bench: one policy, one reward, and the seed.
        rows: the prompts.
        **more: how answers are drawn.
    """
    (policy,), (reward,) = bench.policies, bench.rewards
    return {
        "policy": policy,
        "reward": reward,
        **asdict(rejection),
        **more,
        "seed": bench.seed,
        "dtype": bench.dtype,
        "the files of the policy": key_of_settings(files_of(policy)),
        "the files of the reward": key_of_settings(bench.files_of_reward(reward)),
        "the prompts": key_of_settings([list(row) for row in rows]),
    }


def sample_rows(
    rows: Sequence[TextRow], rejection: Rejection, bench: Bench, lines: Lines, settings: dict[str, Any]
) -> Sampled:
    """Draw answers, score them, and keep those that the reward likes best.

    Args:
        rows: the prompts, B of them.
        rejection: what is drawn and kept.
        bench: one policy, one reward, and how they are asked.
        lines: what is made is kept there, and what was made before is not made again.
        settings: see `settings_of`.

    Raises:
        UserError: a reward that fails, or gives a score that is not finite.
    """
    (name,), (reward,) = bench.policies, bench.rewards
    policy, judge = bench.policy(name), bench.judge(reward)
    about = {"policy": name, "reward": judge.name} | ({"iteration": rejection.label} if rejection.label else {})

    def ask(places: list[int], told: Progress) -> list[dict[str, Any]]:
        return _ask([rows[place] for place in places], rejection, bench, policy, judge, told)

    lines.contents = {row.row: key_of_settings(row) for row in rows}
    key = key_of_settings(settings)
    if not lines.before(_SETTINGS):
        lines.add([{"metric": _SETTINGS, "model": name, "row": -1, "key": key, "settings": settings}])
    made = each_row(NAME, name, key, rows, pieces_of_several(rows, rejection.k, bench), ask, bench, lines)
    found = [line for line in made if line["kept"] is not None]
    dropped = Counter(line["dropped"] for line in made if line["kept"] is None)
    assert len(found) + dropped.total() == len(rows)
    answers = sum((Counter(line["lost"]) for line in made), Counter[str]())
    best, mean = (sum(line[which] for line in found) / max(1, len(found)) for which in ("best", "mean"))
    written = [{**line["kept"], "k": rejection.k, **about} for line in found]
    return Sampled(written, dropped, answers, best, mean)


def _ask(
    rows: Sequence[TextRow], rejection: Rejection, bench: Bench, policy: Policy, judge: Judge, told: Progress
) -> list[dict[str, Any]]:
    """What is made of some rows, in their order."""
    drawn = [rejection.drawn_with(row.written) for row in rows]
    reasons = [
        _cannot_be_read(one, rejection.kept_as(row.written), bench, policy, judge)
        for row, one in zip(rows, drawn, strict=True)
    ]
    able = [i for i, reason in enumerate(reasons) if not reason]
    answers = draw(policy, [drawn[i] for i in able], [rows[i].row for i in able], rejection.k, bench) if able else []
    told(len(rows) / 2)
    lost: list[Counter[str]] = [Counter() for _ in rows]
    said: list[list[tuple[Scored, Answer]]] = [[] for _ in rows]
    for i, several in zip(able, answers, strict=True):
        kept = rejection.kept_as(rows[i].written)
        for one in several:
            text = policy.as_taught(drawn[i], one)
            if flaw := _flaw(text, one, rejection):
                lost[i][flaw] += 1
            else:
                said[i].append((Scored(rows[i].row, kept, text, one.ended), one))
    flat = [scored for usable in said for scored, _ in usable]
    scores: Iterator[float] = iter(scores_of(bench.rewards[0], flat, bench).tolist() if flat else [])
    made = []
    for reason, usable, flaws in zip(reasons, said, lost, strict=True):
        ranked = [(next(scores), scored, one) for scored, one in usable]
        ranked.sort(key=lambda answer: -answer[0])  # of equals the first drawn stays first
        made.append(_made(reason, ranked, rejection.keep) | {"lost": dict(flaws)})
    return made


def _cannot_be_read(drawn: WrittenPrompt, kept: WrittenPrompt, bench: Bench, policy: Policy, judge: Judge) -> str:
    """Why a prompt cannot be answered whole, or its answers not be scored; "" where both can be."""
    try:
        if judge.chat is not None:
            judge.chat.encode_prompt(kept.prompt, kept.tools)
        return "" if policy.fits(drawn, bench.sampling.max_new_tokens) else LONG_PROMPT
    except RefusedTurnsError as error:
        return f"{REFUSED}: {error.reason}"


def _flaw(text: str, one: Answer, rejection: Rejection) -> str:
    """Why an answer does not count; "" where it does."""
    if not one.ended and rejection.unfinished == "drop":
        return "response did not end"
    try:
        check_text(text, "response")
    except BadRowError as error:
        return str(error)
    return ""


def _made(reason: str, ranked: list[tuple[float, Scored, Answer]], keep: Keep) -> dict[str, Any]:
    """The line of one prompt: its row, or why there is none."""
    if not ranked and not reason:
        reason = NO_ANSWER
    if not reason and keep != "best":
        if ranked[0][0] == ranked[-1][0]:
            reason = ALIKE
        elif ranked[0][1].response.strip() == ranked[-1][1].response.strip():
            reason = SAME
    if reason:
        return {"kept": None, "dropped": reason}
    scores = [score for score, *_ in ranked]
    _, first, answer = ranked[0]
    row: dict[str, Any] = {"row": first.row, "prompt": first.prompt.prompt}
    if keep == "best":
        row |= {"response": first.response, "score": scores[0], "ended": answer.ended, "tokens": len(answer.ids)}
    elif keep == "all":
        row |= {"responses": [scored.response for _, scored, _ in ranked], "scores": scores}
    else:
        row |= {"chosen": first.response, "rejected": ranked[-1][1].response}
        row |= {"chosen_score": scores[0], "rejected_score": scores[-1]}
    if first.prompt.tools:
        row["tools"] = list(first.prompt.tools)
    return {"kept": row, "best": scores[0], "mean": sum(scores) / len(scores)}
