"""The engine that asks a server with OpenAI's API for chats: vLLM, SGLang or ``transformers serve``.

What is sent and what a reply means are functions without input or output; :class:`ServerEngine` sends.
HTTP is spoken by ``requests``, which is here already because modelscope requires it, from threads: a
request waits for seconds to minutes, so that threads cost nothing, and they work inside any event loop.
"""

from __future__ import annotations

import base64
import io
import json
import queue
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import PIL.Image
import requests

from diffsynth_metrics.errors import ServerError
from diffsynth_metrics.judges.engine import Answer, Engine, Question
from diffsynth_metrics.judges.local import check_max_new_tokens

__all__ = [
    "DIALECTS",
    "ServerEngine",
    "find_dialect",
    "read_answer",
    "request_body",
    "retry_delay",
    "seconds_of",
]

DIALECTS = ("vllm", "sglang", "transformers")
"""Servers whose own fields are known."""

_LONGEST_PAUSE = 60.0
_RETRIED = {408, 429, 502, 503, 504}
# Special tokens of the judges' tokenizers. A server reads them as what they are, also in a user's text,
# and `transformers serve` writes some of them into its answers, where they are left out in memory.
_CONTROL = r"<\|[^|<>\s]+\|>"
_SPECIAL = re.compile(rf"{_CONTROL}|</?(?:think|tool_call|tool_response)>")


class ServerEngine(Engine):
    """Asks a server, several questions at once.

    The server has to serve the judge's own checkpoint with its own chat template. Pictures are sent as
    PNG, without loss; how small or large the network sees them is decided by the server's
    ``preprocessor_config.json``. Answers are greedy. A question that fails has an answer with an error,
    and the others go on. After an interruption (Ctrl-C) nothing more is sent, and requests that are
    under way are not waited for.

    Attributes:
        base_url: The address, which ends with ``/v1``.
        concurrency: How many requests are under way at once.
        timeout: Seconds that a reply may take.
        retries: How often a request is sent again.
        max_new_tokens: The largest number of tokens of an answer.
        extra_body: Further fields of every request.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        dialect: str = "auto",
        concurrency: int = 16,
        timeout: float = 300,
        retries: int = 4,
        max_new_tokens: int = 4096,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        """Remember how to ask; nothing is sent yet.

        Args:
            base_url: Such as ``"http://host:8000/v1"``.
            model: The name under which the server has the judge; None: the only one that it has.
            api_key: Sent as a bearer token; it appears in no message.
            dialect: Which server it is, one of :data:`DIALECTS`; ``"auto"`` asks it.
            concurrency: How many requests are under way at once.
            timeout: Seconds that a reply may take.
            retries: How often a request is sent again after a lost connection, 408, 429, 502, 503, 504.
            max_new_tokens: Answers are cut off there, and then say so.
            extra_body: Further fields of every request, such as a server's own.

        Raises:
            TypeError: `extra_body` is not plain JSON.
            ValueError: Another argument is wrong.
        """
        self.base_url = _checked_url(base_url)
        if dialect not in ("auto", *DIALECTS):
            raise ValueError(f"dialect must be 'auto' or one of {DIALECTS}, got {dialect!r}")
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(f"concurrency must be a positive int, got {concurrency!r}")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries must be 0 or a positive int, got {retries!r}")
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
        self.extra_body: dict[str, Any] = json.loads(json.dumps(dict(extra_body or {})))
        if own := {"messages", "model", "n", "stream"} & self.extra_body.keys():
            raise ValueError(f"extra_body cannot set {sorted(own)[0]!r}, which the engine sets")
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.max_new_tokens = check_max_new_tokens(max_new_tokens)
        self._api_key = api_key
        self._model = model
        self._dialect = dialect

    def __repr__(self) -> str:
        """Show where it asks."""
        return f"ServerEngine({self.base_url!r}, model={self._model!r}, dialect={self._dialect!r})"

    @property
    def identity(self) -> dict[str, Any]:
        """The model's name and the settings of the requests; a server tells no more about its weights.

        Raises:
            ServerError: The server does not say what it serves.
        """
        model, dialect = self._served()
        return {
            "engine": type(self).__name__,
            "model": model,
            "dialect": dialect,
            "max_new_tokens": self.max_new_tokens,
            "extra_body": self.extra_body,
        }

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return one answer per question, in order.

        Raises:
            ServerError: There is not a single answer.
        """
        answers = dict(self.ask_each(questions))
        return [answers[index] for index in range(len(questions))]

    def ask_each(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Yield the index of a question and its answer, in the order in which they come.

        Raises:
            ServerError: There is not a single answer; said behind the last one.
        """
        asked = [index for index, question in enumerate(questions) if not _special(question)]
        for index in sorted(set(range(len(questions))) - set(asked)):
            yield index, _failed(_special(questions[index]))
        if not asked:
            return
        failures: list[str] = []
        for index, answer in self._replies(questions, asked):
            failures += [answer.error] if answer.error else []
            yield index, answer
        if len(failures) == len(asked):
            raise ServerError(
                f"Check that the server at {self.base_url} runs, serves {self._model!r} and accepts the "
                f"API key: none of {len(asked)} questions was answered. The first failure: {failures[0]}"
            )

    def _replies(self, questions: Sequence[Question], asked: list[int]) -> Iterator[tuple[int, Answer]]:
        """Ask from as many threads as requests may be under way, and yield what they put in a queue."""
        model, dialect = self._served()
        encoded = _Encoded()
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in asked:
            waiting.put(index)
        found: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()
        stopped = threading.Event()

        def work() -> None:
            with requests.Session() as session:
                while not stopped.is_set():
                    try:
                        index = waiting.get_nowait()
                    except queue.Empty:
                        return
                    try:
                        body = request_body(questions[index], model, dialect, encoded=encoded)
                        limits = {"max_tokens": self.max_new_tokens, **self.extra_body}
                        thinks = bool(questions[index].thinking)
                        found.put((index, self._answer(session, body | limits, stopped, thinks=thinks)))
                    except BaseException as error:
                        found.put((index, error))

        try:
            for _ in range(min(self.concurrency, len(asked))):
                # Threads that do not keep an interrupted process from ending.
                threading.Thread(target=work, daemon=True, name="judge server").start()
            for _ in asked:
                index, answer = _next(found)
                if isinstance(answer, BaseException):
                    raise answer
                yield index, answer
        finally:
            stopped.set()

    def _answer(
        self, session: Any, body: dict[str, Any], stopped: threading.Event, *, thinks: bool
    ) -> Answer:
        """Send a question until there is an answer or no hope for one."""
        statuses: list[int | None] = []
        while len(statuses) <= self.retries:
            start = time.monotonic()
            status, text, after = self._post(session, body)
            if status == 200:
                return read_answer(text, thinks=thinks, seconds=time.monotonic() - start)
            statuses.append(status)
            delay = retry_delay(statuses, after)
            if delay is None or len(statuses) > self.retries or stopped.wait(delay):
                break
        return _failed(text if status is None else f"HTTP {status}: {text[:300]}")

    def _post(self, session: Any, body: dict[str, Any]) -> tuple[int | None, str, float | None]:
        """Return status, text and the seconds of Retry-After; a lost connection has no status."""
        address = f"{self.base_url}/chat/completions"
        try:
            reply = session.post(
                address,
                json=body,
                auth=self._authorize,
                timeout=self.timeout,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            return None, self._without_key(f"{type(error).__name__}: {error}"), None
        now = datetime.now(timezone.utc)
        after = seconds_of(reply.headers.get("Retry-After"), now)
        return reply.status_code, self._without_key(reply.text), after

    def _authorize(self, request: Any) -> Any:
        """Set the key; as a function, because `requests` would prefer a .netrc to a header."""
        if self._api_key is not None:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        return request

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text

    def _served(self) -> tuple[str, str]:
        """Return the name of the model and the dialect, which the server is asked for once."""
        if self._model is None or self._dialect == "auto":
            models = self._models()
            self._model = self._model or _only(models, self.base_url)
            self._dialect = find_dialect(models) if self._dialect == "auto" else self._dialect
        return self._model, self._dialect

    def _models(self) -> list[dict[str, Any]]:
        try:
            reply = requests.get(
                f"{self.base_url}/models", auth=self._authorize, timeout=min(self.timeout, 30)
            )
            if reply.status_code != 200:
                raise ValueError(f"HTTP {reply.status_code}: {reply.text[:300]}")
            return [dict(model) for model in reply.json()["data"]]
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            why = self._without_key(f"{type(error).__name__}: {error}")
            raise ServerError(
                f"Check that a server runs at {self.base_url}, that the address ends with /v1, and the "
                f"API key: it does not say which models it has. {why}"
            ) from None


def request_body(
    question: Question, model: str, dialect: str, *, encoded: _Encoded | None = None
) -> dict[str, Any]:
    """Return the body of a request in a server's own fields, without the limit of tokens.

    Greedy decoding and the repetition penalty are always said, because servers otherwise take them from
    the model's ``generation_config.json``.
    """
    encode = _Encoded() if encoded is None else encoded
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": encode(part)}}
        for part in question.content
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if question.system is not None:
        messages.insert(0, {"role": "system", "content": question.system})
    body: dict[str, Any] = {"model": model, "messages": messages, "temperature": 0}
    if question.thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": question.thinking}
    if dialect == "transformers":
        settings = {"do_sample": False, "repetition_penalty": question.repetition_penalty}
        return body | {"generation_config": json.dumps(settings)}
    return body | {"repetition_penalty": question.repetition_penalty}


def read_answer(text: str, *, thinks: bool, seconds: float) -> Answer:
    """Return what the text of a reply with the status 200 says, with thinking before the answer."""
    try:
        reply = json.loads(text)
        choice = reply["choices"][0]
        message, finish = choice["message"], choice["finish_reason"]
        usage = reply.get("usage") or {}
        content = message.get("content") or ""
        thought = message.get("reasoning") or message.get("reasoning_content") or ""
        names = {"prompt_tokens": "prompt_tokens", "answer_tokens": "completion_tokens"}
        took = {name: int(usage[field]) for name, field in names.items() if field in usage}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return _failed(f"the reply is no chat completion: {text[:300]!r}")
    if finish not in ("stop", "length"):
        return _failed(f"the answer ended with finish_reason {finish!r}")
    text = _joined(thought, content, finish, thinks=thinks)
    return Answer(re.sub(_CONTROL, "", text), finish, usage={**took, "seconds": seconds})


def _joined(thought: str, content: str, finish: str, *, thinks: bool) -> str:
    """Return thinking and answer in one text, as the network wrote them."""
    if not thought:
        return content
    if not thinks and not content:  # the server took the answer of a network that does not think for it
        return thought
    if finish == "length" and not content:
        return f"<think>\n{thought}"
    return f"{thought}\n</think>\n\n{content}"


def retry_delay(statuses: Sequence[int | None], after: float | None) -> float | None:
    """Return the seconds to wait before a request is sent again, or None where that makes no sense.

    Args:
        statuses: The HTTP statuses of its replies so far, None where the connection was lost.
        after: What the server last said in Retry-After, which is followed up to a minute.
    """
    last = statuses[-1]
    if not (last is None or last in _RETRIED or (last == 500 and statuses.count(500) == 1)):
        return None
    if after is not None:
        return min(max(after, 0.0), _LONGEST_PAUSE)
    return min(0.5 * 2.0 ** min(len(statuses) - 1, 10), _LONGEST_PAUSE)


def seconds_of(header: str | None, now: datetime) -> float | None:
    """Return the seconds that a Retry-After asks for, as a number or a date; None: it is neither."""
    if header is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", header.strip()):
        return float(header)
    try:
        return (parsedate_to_datetime(header) - now).total_seconds()
    except (ValueError, TypeError):
        return None


def find_dialect(models: Sequence[Mapping[str, Any]]) -> str:
    """Return which server lists these models.

    Raises:
        ValueError: It is none that is known.
    """
    owners = {str(model.get("owned_by")) for model in models}
    for dialect in ("vllm", "sglang"):
        if dialect in owners:
            return dialect
    if any(isinstance(model.get("status"), Mapping) for model in models):
        return "transformers"
    raise ValueError(f"pass dialect=, one of {DIALECTS}: the server does not say which one it is")


def _only(models: Sequence[Mapping[str, Any]], base_url: str) -> str:
    names = [str(model.get("id")) for model in models]
    if len(names) != 1:
        raise ValueError(f"pass model=: {base_url} has {', '.join(names) or 'no model'}")
    return names[0]


def _checked_url(base_url: str) -> str:
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"base_url must be an address such as 'http://host:8000/v1', got {base_url!r}")
    if parts.username or parts.password:
        raise ValueError("pass the key as api_key: a base_url with a password appears in messages")
    return base_url.rstrip("/")


def _special(question: Question) -> str:
    """Say which special token of the model a text holds; empty where there is none."""
    texts = [part for part in question.content if isinstance(part, str)]
    found = _SPECIAL.search("\n".join([question.system or "", *texts]))
    return f"the text holds {found.group()!r}, which a server reads as a special token" if found else ""


def _failed(reason: str) -> Answer:
    return Answer("", "error", error=reason)


def _next(found: queue.SimpleQueue[Any]) -> Any:
    """Return what comes next; on Windows only a wait that ends can be interrupted."""
    while True:
        try:
            return found.get(timeout=1)
        except queue.Empty:
            continue


class _Encoded:
    """Pictures as data URIs of PNG files, each made once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[int, str] = {}

    def __call__(self, picture: PIL.Image.Image) -> str:
        with self._lock:
            if id(picture) not in self._made:
                file = io.BytesIO()
                picture.save(file, format="PNG", compress_level=1)
                data = base64.b64encode(file.getvalue()).decode("ascii")
                self._made[id(picture)] = f"data:image/png;base64,{data}"
            return self._made[id(picture)]
