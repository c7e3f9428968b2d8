"""Rollouts of several turns: the model calls tools, reads their results and goes on.

Token in, token out: what the model sampled is never encoded again. Behind it stand the ids with
which the chat template goes on, the difference of two renders by the run's encoder.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from luthier.chat import ChatEncoder, ChatError
from luthier.errors import UserError
from luthier.train import console
from luthier.train.methods.online import NO_COLUMNS
from luthier.train.methods.tools import CallRequest, ToolBox, ToolResult, call_tools

Messages = list[dict[str, Any]]

Generate = Callable[[list[list[int]]], tuple[list[list[int]], list[list[float]] | None]]
"""Takes ids to go on from; returns what the model wrote behind each, and its log-probabilities."""


@dataclass
class Rollout:
    """A prompt and what followed: the model's replies, and the results of what it called."""

    location: str
    """Where the prompt's row stands, such as `data.jsonl:7`."""
    prompt: Messages
    prompt_ids: list[int]
    variables: dict[str, Any] | None = None
    """The row's own variables for the chat template."""
    environment: Any = None
    """The object in which the model acts; None where the run has none."""
    ids: list[int] = field(default_factory=list)
    """All ids behind the prompt, the results of tools included."""
    is_sampled: list[int] = field(default_factory=list)
    """1 for each of `ids` that the model sampled, 0 for those that the template wrote."""
    logps: list[float] = field(default_factory=list)
    """The log-probability with which each of `ids` was sampled, 0 for the template's."""
    messages: Messages = field(default_factory=list)
    """The same as messages: replies and results."""
    rendered: list[int] = field(default_factory=list)
    """The ids up to the next reply as the template writes them, in the template's own spelling."""
    pending: list[CallRequest] = field(default_factory=list)
    """The calls of the last reply, which wait for their results."""
    calls: int = 0
    failures: int = 0
    end: str = ""
    """Why the model did not end it: `cut` at the longest completion, `no room` for a tool's result,
    `rewritten` by the template, or `turns`; empty where the model stopped by itself."""

    @property
    def context(self) -> list[int]:
        """The ids from which the model goes on."""
        return self.prompt_ids + self.ids

    @property
    def sampled_ids(self) -> list[int]:
        """What the model sampled, without the results of tools."""
        return [token for token, own in zip(self.ids, self.is_sampled, strict=True) if own]

    @property
    def sampled_logps(self) -> list[float]:
        """The log-probability of each token that the model sampled."""
        return [logp for logp, own in zip(self.logps, self.is_sampled, strict=True) if own]

    def add(self, ids: Sequence[int], is_sampled: bool, logps: Sequence[float] | None) -> None:
        """Append ids."""
        self.ids += ids
        self.is_sampled += [int(is_sampled)] * len(ids)
        self.logps += logps if logps is not None else [0.0] * len(ids)


class RewrittenHistoryError(Exception):
    """The template shows a reply otherwise once something follows it."""


class Continuation(NamedTuple):
    """How the template goes on behind a reply."""

    suffix: list[int]
    """The ids between the reply's stop token and the next reply."""
    rendered: list[int]
    """All ids up to the next reply, as the template writes them."""


class TurnEncoder:
    """Reads replies back into messages, and goes on behind them as the chat template does."""

    def __init__(self, encoder: ChatEncoder, tools: list[dict[str, Any]]) -> None:
        """`tools` are JSON schemas; the encoder trains on all turns, and loses no text."""
        self.encoder = encoder
        self.tools = tools or None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens included."""
        text: str = self.encoder.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def parse(
        self, history: Messages, ids: Sequence[int], variables: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return a sampled reply to a history as a message; what is no call stays content."""
        # As text: the model may spell the template's text with other tokens than the tokenizer.
        return self.encoder.parse(self.decode(ids), history, self.tools, variables).message

    def continue_behind(
        self,
        rendered: list[int],
        history: Messages,
        sampled: list[int],
        results: Messages,
        variables: dict[str, Any] | None = None,
    ) -> Continuation:
        """Return how the template goes on behind a sampled reply, the last message of `history`.

        `rendered`: the ids before that reply as the template wrote them. Raises
        RewrittenHistoryError where it does not show these again, or shows the reply otherwise than
        it was sampled; white space may differ, such as that of JSON.
        """
        stop = sampled[-1]
        full = self.encoder.prompt([*history, *results], self.tools, variables)
        if full[: len(rendered)] != rendered:
            raise RewrittenHistoryError("it writes what stands before the reply anew")
        if stop not in full[len(rendered) :]:
            raise RewrittenHistoryError(f"it does not end the reply with {self.decode([stop])}")
        end = full.index(stop, len(rendered)) + 1
        shown = full[len(rendered) : end]
        if shown != sampled:
            texts = self.decode(shown), self.decode(sampled)
            if "".join(texts[0].split()) != "".join(texts[1].split()):
                raise RewrittenHistoryError(f"it shows {texts[1]!r} as {texts[0]!r}")
        return Continuation(full[end:], full)

    def check_template(self, stop_ids: Sequence[int]) -> None:
        """Try two calls with their results, before anything trains.

        Raises UserError where the template cannot show them, where the calls cannot be read back
        from the reply, or where it does not go on from a model's own tokens. The calls come with
        reasoning where the template shows any.
        """
        assert self.tools
        problem = None
        for reasoning in (_EXAMPLE_TEXT, None):
            try:
                self._try_rollout(reasoning, stop_ids)
                return
            except ChatError as error:
                # A template without reasoning, or none with it, as its prompts rule it out.
                problem = str(error)
                if reasoning is None:
                    raise UserError(f"trainer.tools: the chat template: {problem}") from None
            except RewrittenHistoryError as error:
                raise UserError(
                    "trainer.tools: the chat template does not go on from the model's own tokens "
                    f"once a tool has answered: {error}.\nA model would be trained in a context "
                    "that no server shows it. Set chat.template to one that leaves earlier turns "
                    "as they were written, such as a *_training.jinja of trl/chat_templates."
                ) from None

    def _try_rollout(self, reasoning: str | None, stop_ids: Sequence[int]) -> None:
        name, arguments = _example_call(self.tools or [])
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        # Mistral's templates take ids of nine letters and digits, and no call without.
        call["id"] = "call00001"
        history: Messages = [{"role": "user", "content": _EXAMPLE_TEXT}]
        rendered = self.encoder.prompt(history, self.tools)
        for _ in range(2):
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
            if reasoning is not None:
                message["reasoning_content"] = reasoning
            reply = self._encode_reply(history, message, rendered)
            if reply[-1] not in stop_ids:
                raise UserError(
                    f"trainer.tools: a call ends with {self.decode(reply[-1:])}, which does not "
                    "end a reply without tools. Use a chat template whose replies all end alike."
                )
            parsed = self.parse(history, reply)
            if [each.name for each in read_calls(parsed)] != [name]:
                raise UserError(
                    "trainer.tools: the calls of this chat template cannot be read back: "
                    f"{self.decode(reply)!r} should be a call of {name}."
                )
            history = [*history, parsed]
            result = make_result_message(read_calls(parsed)[0], ToolResult(_EXAMPLE_TEXT))
            going_on = self.continue_behind(rendered, history, reply, [result])
            history, rendered = [*history, result], going_on.rendered

    def _encode_reply(
        self, history: Messages, message: dict[str, Any], rendered: list[int]
    ) -> list[int]:
        """Return the ids that the model would write for a message behind these."""
        context = [
            {**each, "train": False} if each["role"] == "assistant" else each for each in history
        ]
        (sequence,) = self.encoder.encode([*context, message], self.tools)
        _, start, stop = sequence.replies[-1]
        if sequence.input_ids[:start] != rendered:
            raise RewrittenHistoryError("it writes what stands before a reply anew")
        return sequence.input_ids[start:stop]


class RolloutRunner:
    """Lets a model answer prompts over several turns, and calls what it calls."""

    def __init__(
        self,
        toolbox: ToolBox,
        turns: TurnEncoder,
        stop_ids: Sequence[int],
        *,
        max_completion_length: int,
        max_turns: int | None,
        time_limit: float,
    ) -> None:
        """`max_completion_length`: the most tokens behind a prompt, the results of tools included.

        `max_turns` is how often a rollout may call tools, `time_limit` the seconds of one call.
        """
        self.toolbox = toolbox
        self._turns = turns
        self._stop_ids = frozenset(stop_ids)
        self._max_completion_length = max_completion_length
        self.max_length: int | None = None
        """The most tokens that the model can read, the prompt included; None for no bound."""
        self._max_turns = max_turns
        self._time_limit = time_limit
        self._environments: list[Any] = []
        self._reported: set[str] = set()

    def start(self, rows: Sequence[Mapping[str, Any]]) -> list[Rollout]:
        """Return the beginnings of rollouts, one for each row, in environments that begin anew.

        A row has `prompt`, `prompt_ids`, `row_location`, and its columns for the environment.
        """
        while len(self._environments) < len(rows):
            self._environments.append(self.toolbox.make_environment())
        return [
            self._start(row, environment)
            for row, environment in zip(rows, self._environments, strict=False)
        ]

    def _start(self, row: Mapping[str, Any], environment: Any) -> Rollout:
        prompt, ids = list(row["prompt"]), list(row["prompt_ids"])
        variables = row.get("template_variables")
        if environment is not None:
            shown = {key: value for key, value in row.items() if key not in NO_COLUMNS}
            location = row["row_location"]
            observation = self.toolbox.reset_environment(
                environment, shown, location, self._time_limit
            )
            if observation is not None:
                prompt[-1] = prompt[-1] | {"content": prompt[-1]["content"] + observation}
                try:
                    ids = self._turns.encoder.prompt(prompt, self._turns.tools, variables)
                except ChatError as error:
                    raise UserError(f"{location}: {error}") from None
        return Rollout(row["row_location"], prompt, ids, variables, environment, rendered=ids)

    def complete(
        self,
        rollouts: Sequence[Rollout],
        generate: Generate,
        share_most: Callable[[int], int] = lambda count: count,
    ) -> None:
        """Answer all prompts, with as many turns as their calls need.

        `share_most` returns the highest count of all processes: each generates as often, and for
        as many rows, as the others, since sharded weights are gathered by all of them together.
        """
        self._add_replies(rollouts, generate([rollout.context for rollout in rollouts]))
        turn = 0
        while self._max_turns is None or turn < self._max_turns:
            active = self._answer_calls([rollout for rollout in rollouts if rollout.pending])
            rows = share_most(len(active))
            if not rows:
                break
            fill = [rollouts[0].prompt_ids] * (rows - len(active))
            written = generate([rollout.context for rollout in active] + fill)
            self._add_replies(active, written)
            turn += 1
        for rollout in rollouts:
            if rollout.pending:
                rollout.pending, rollout.end = [], "turns"

    def _add_replies(
        self,
        rollouts: Sequence[Rollout],
        written: tuple[list[list[int]], list[list[float]] | None],
    ) -> None:
        ids_by_row, logps_by_row = written
        for number, rollout in enumerate(rollouts):
            room = self._max_completion_length - len(rollout.ids)
            ids = ids_by_row[number][:room]
            logps = None if logps_by_row is None else logps_by_row[number][:room]
            rollout.add(ids, True, logps)
            if not ids or ids[-1] not in self._stop_ids:
                rollout.end = "cut"
                text = self._turns.encoder.tokenizer.decode(ids, skip_special_tokens=True)
                message: dict[str, Any] = {"role": "assistant", "content": text}
            else:
                history = rollout.prompt + rollout.messages
                message = self._turns.parse(history, ids, rollout.variables)
            rollout.messages.append(message)
            rollout.pending = read_calls(message)

    def _answer_calls(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Call what waits; return the rollouts in which the model can go on."""
        waiting = [(rollout, call) for rollout in rollouts for call in rollout.pending]
        tools = {id(each): self.toolbox.tools_of(each.environment) for each in rollouts}
        results = call_tools(
            [(call, tools[id(rollout)]) for rollout, call in waiting], self._time_limit
        )
        answers: dict[int, Messages] = {id(rollout): [] for rollout in rollouts}
        for (rollout, call), result in zip(waiting, results, strict=True):
            rollout.calls += 1
            rollout.failures += result.has_failed
            self._report_failure(rollout, call, result)
            answers[id(rollout)].append(make_result_message(call, result))
        return [each for each in rollouts if self._go_on(each, answers[id(each)])]

    def _go_on(self, rollout: Rollout, results: Messages) -> bool:
        """Append the results of a rollout's calls; return whether there is room for a reply."""
        rollout.pending = []
        sampled = list(_last_reply(rollout))
        history = rollout.prompt + rollout.messages
        try:
            suffix, rendered = self._turns.continue_behind(
                rollout.rendered, history, sampled, results, rollout.variables
            )
        except (RewrittenHistoryError, ChatError) as error:
            rollout.end = "rewritten"
            self._report_once(
                f"rollout   row {rollout.location} ends at a call, as the chat template does not "
                f"go on from it: {error}"
            )
            return False
        length = len(rollout.ids) + len(suffix)
        most = self.max_length
        # As in TRL: what does not fit is not appended, and the rollout ends with its call.
        if length >= self._max_completion_length or (
            most is not None and len(rollout.prompt_ids) + length >= most
        ):
            rollout.end = "no room"
            return False
        rollout.add(suffix, False, None)
        rollout.messages += results
        rollout.rendered = rendered
        return True

    def _report_failure(self, rollout: Rollout, call: CallRequest, result: ToolResult) -> None:
        # What the model did wrong is no news: it learns from it.
        if result.fault is not None:
            self._report_once(
                f"tool      {call.name} failed, and the model reads the error; row "
                f"{rollout.location}: {result.fault}",
                f"{call.name} {result.fault.rpartition('(')[2]}",
            )

    def _report_once(self, text: str, key: str | None = None) -> None:
        if (key or text) not in self._reported and len(self._reported) < _MOST_REPORTS:
            self._reported.add(key or text)
            console.print_line(text)


_MOST_REPORTS = 10
"""The number of failures of tools that a process prints; all are counted."""


def _last_reply(rollout: Rollout) -> Iterator[int]:
    """Yield the ids of the reply that a rollout ends with."""
    start = len(rollout.ids)
    while start and rollout.is_sampled[start - 1]:
        start -= 1
    yield from rollout.ids[start:]


def read_calls(message: Mapping[str, Any]) -> list[CallRequest]:
    """Return the calls of a message."""
    calls = []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        calls.append(CallRequest(function["name"], function.get("arguments") or {}, call.get("id")))
    return calls


def make_result_message(call: CallRequest, result: ToolResult) -> dict[str, Any]:
    """Return the message with a call's result."""
    message = {"role": "tool", "name": call.name, "content": result.content}
    return message if call.id is None else message | {"tool_call_id": call.id}


def _example_call(tools: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Return the name of the first tool, and arguments of the kinds that it takes."""
    function = tools[0]["function"]
    properties = function.get("parameters", {}).get("properties", {})
    return function["name"], {
        name: _EXAMPLES.get(_kind(p), _EXAMPLE_TEXT) for name, p in properties.items()
    }


_EXAMPLE_TEXT = "1"
"""A text that the vocabulary of every tokenizer can write, also that of a tiny one."""
_EXAMPLES: dict[str, Any] = {
    "integer": 1, "number": 1, "boolean": True, "array": [], "object": {},
}  # fmt: skip


def _kind(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    return str(kind[0] if isinstance(kind, list) and kind else kind)
