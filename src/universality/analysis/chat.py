"""Language models to ask: any endpoint that speaks OpenAI's chat completions, or a local transformers model; answers
cached on disk by content, so that a rerun asks nothing twice.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any, Protocol

import requests
from tenacity import RetryCallState, retry, retry_if_exception_type, stop_after_attempt, wait_exponential

from universality.analysis.endpoint import Endpoint
from universality.errors import StudyError
from universality.runtime import log
from universality.storage import read_json, write_json

Messages = list[dict[str, str]]
"""[{"role": "system" | "user", "content": text}]."""
_CHARACTERS = 4  # a token, about, in English


class Chat(Protocol):
    """Something to ask. `identity`: what its answers depend on, beside the messages."""

    identity: str

    def ask(self, messages: Messages) -> str:
        """The answer's text. Raises StudyError if there is none."""


class _Again(Exception):
    """Worth another attempt; `wait`: seconds that the endpoint asks for, or None."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class HttpChat:
    """POST {base_url}/chat/completions, at most `per_minute` a minute; time-outs, 429 and 5xx are tried again."""

    def __init__(
        self,
        endpoint: Endpoint,
        timeout: float = 60,
        attempts: int = 5,
        per_minute: float = 60,
        longest_wait: float = 60,
    ):
        self.endpoint, self.timeout, self.longest_wait = endpoint, timeout, longest_wait
        self.identity = f"{endpoint.base_url} {endpoint.model}"
        self.retries = 0
        self._pause, self._last = 60 / per_minute, -float("inf")
        self._session = requests.Session()
        if endpoint.key:
            self._session.headers["Authorization"] = f"Bearer {endpoint.key}"
        self._try = retry(
            retry=retry_if_exception_type(_Again),
            stop=stop_after_attempt(attempts),
            wait=self._wait,
            reraise=True,
        )(self._post)

    def ask(self, messages: Messages) -> str:
        try:
            return self._try(messages)
        except _Again as error:
            raise StudyError(f"judge: {self.endpoint.base_url}: {error}; tried as often as allowed") from None

    def _wait(self, state: RetryCallState) -> float:
        self.retries += 1
        error = state.outcome.exception() if state.outcome else None
        asked = getattr(error, "wait", None)
        longest = self.longest_wait
        return min(asked, longest) if asked is not None else wait_exponential(max=longest)(state)

    def _post(self, messages: Messages) -> str:
        time.sleep(max(0.0, self._last + self._pause - time.monotonic()))
        self._last = time.monotonic()
        body: dict[str, Any] = {"model": self.endpoint.model, "messages": messages, "temperature": 0}
        url = f"{self.endpoint.base_url.rstrip('/')}/chat/completions"
        try:
            answer = self._session.post(url, json=body, timeout=self.timeout)
        except (requests.Timeout, requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            raise _Again(type(error).__name__) from None
        except requests.RequestException as error:
            raise StudyError(f"judge: {url}: {error}") from None
        if answer.status_code == 429 or answer.status_code >= 500:
            asked = answer.headers.get("Retry-After", "")
            raise _Again(f"HTTP {answer.status_code}", float(asked) if asked.replace(".", "", 1).isdigit() else None)
        if answer.status_code != 200:
            raise StudyError(f"judge: {url}: HTTP {answer.status_code}: {answer.text[:200]}")
        try:
            content = answer.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            raise _Again("an answer that is no chat completion")
        return content


class LocalChat:
    """A transformers model with a chat template, from a folder or the hub's cache; greedy."""

    def __init__(self, path: str, max_new_tokens: int = 128):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.identity = f"{path}, at most {max_new_tokens} tokens"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise StudyError(f"judge: {path}: cannot be loaded: {error}") from None
        if self._tokenizer.chat_template is None:
            raise StudyError(f"judge: {path}: its tokenizer has no chat template")
        self._model = AutoModelForCausalLM.from_pretrained(path).eval()
        self._max_new_tokens = max_new_tokens

    def ask(self, messages: Messages) -> str:
        import torch

        tokens = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            made = self._model.generate(**tokens, max_new_tokens=self._max_new_tokens, do_sample=False)
        return self._tokenizer.decode(made[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


class CachedChat:
    """Answers from a folder where they are known; {sha256 of what was asked of whom}.json each."""

    def __init__(self, chat: Chat, folder: Path):
        self.chat, self.folder = chat, folder
        self.identity = chat.identity

    def path(self, messages: Messages) -> Path:
        asked = json.dumps([self.identity, messages], sort_keys=True, ensure_ascii=False)
        return self.folder / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"

    def known(self, messages: Messages) -> str | None:
        """The answer, if it was given before."""
        path = self.path(messages)
        return read_json(path)["answer"] if path.exists() else None

    def ask(self, messages: Messages) -> str:
        known = self.known(messages)
        if known is not None:
            return known
        path, answer = self.path(messages), self.chat.ask(messages)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"identity": self.identity, "messages": messages, "answer": answer})
        return answer

    def tell_cost(self, asked: list[Messages]) -> tuple[int, int]:
        """(requests, tokens) of which the answers are not known yet, about; said before anything is asked."""
        new = [messages for messages in asked if self.known(messages) is None]
        tokens = sum(len(message["content"]) for messages in new for message in messages) // _CHARACTERS
        log.info("judge: %d of %d requests are new, about %d tokens to read", len(new), len(asked), tokens)
        return len(new), tokens
