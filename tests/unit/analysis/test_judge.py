"""A real server on this machine that speaks chat completions, well and badly; nothing else is asked."""

import numpy as np
import pytest

from tests.conftest import tiny_model
from tests.unit.analysis.endpoint import GOOD, Server, completion
from universality.analysis.chat import CachedChat, HttpChat, LocalChat
from universality.analysis.endpoint import Endpoint
from universality.analysis.held_out import Marked
from universality.analysis.judge import Chosen, Rating, Shown, judge, parse, rating_question
from universality.corpus.tokenizer import load_tokenizer
from universality.errors import StudyError


def shown(word: str = "cat") -> Shown:
    def of(token, n):
        return [Marked(f"text {k} of a ", token, " on a mat") for k in range(n)]

    return Shown(of(word, 5), of(word, 6), of("dog", 6), [Marked("text ", str(k), f" of a {word}") for k in range(6)])


@pytest.fixture
def server():
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


def chat_of(server, tmp_path, **changes) -> CachedChat:
    endpoint = Endpoint(server.url, "m", "secret")
    values = {"timeout": 0.5, "attempts": 4, "per_minute": 60_000, "longest_wait": 0.2} | changes
    return CachedChat(HttpChat(endpoint, **values), tmp_path / "answers")


def test_a_judge_that_reads_scores_all_and_a_rerun_asks_nothing(server, tmp_path):
    chat = chat_of(server, tmp_path)
    [found] = judge(chat, [shown()], seed=0)
    assert found.rating == Rating(complexity=2, monosemanticity=2, explanation="the word cat")
    assert (found.detection, found.fuzzing, found.malformed) == (1.0, 1.0, 0)
    assert len(server.asked) == 3
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.asked[0]["model"] == "m"
    assert server.asked[0]["temperature"] == 0
    assert judge(chat_of(server, tmp_path), [shown()], seed=0) == [found]
    assert len(server.asked) == 3
    judge(chat, [shown("cats")], seed=0)  # other contexts are other questions
    assert len(server.asked) == 6


def test_the_cost_of_what_is_new_is_told_before_anything_is_asked(server, tmp_path):
    chat = chat_of(server, tmp_path)
    questions = [rating_question(shown(word)) for word in ("cat", "cats")]
    requests, tokens = chat.tell_cost(questions)
    assert requests == 2
    assert 100 < tokens < 2000
    assert server.asked == []
    chat.ask(questions[0])
    assert chat.tell_cost(questions)[0] == 1


@pytest.mark.parametrize(
    "script",
    [
        [(429, "busy")],
        [(503, "down"), (500, "down")],
        [1.5],
        [(200, b"{broken")],
        [(200, b"{}"), (429, "busy")],
        [(200, completion(None))],
    ],
    ids=["429", "5xx", "time-out", "broken JSON", "no choices", "no content"],
)
def test_what_passes_is_tried_again(server, tmp_path, script):
    server.script = list(script)
    chat = chat_of(server, tmp_path)
    assert chat.ask(rating_question(shown())) == GOOD
    assert chat.chat.retries == len(script)


def test_what_does_not_pass_is_one_line_that_names_the_endpoint(server, tmp_path):
    server.script = [(429, "busy")] * 9
    with pytest.raises(StudyError, match=rf"{server.url}: HTTP 429; tried as often as allowed"):
        chat_of(server, tmp_path, attempts=3).ask(rating_question(shown()))
    assert len(server.asked) == 3
    server.script = [(401, b"who are you?")]
    with pytest.raises(StudyError, match="HTTP 401: who are you?"):
        chat_of(server, tmp_path).ask(rating_question(shown()))
    assert not list((tmp_path / "answers").glob("*")), "no failure is kept as an answer"


def test_requests_keep_to_the_rate(server, tmp_path):
    chat = chat_of(server, tmp_path, per_minute=600)
    for word in ("a", "b", "c"):
        chat.ask(rating_question(shown(word)))
    assert np.diff(server.times).min() > 0.09


@pytest.mark.parametrize(
    "answer",
    ["I think it is complex.", '{"complexity": 7, "monosemanticity": 1, "explanation": "x"}', '{"complexity": "2"}',
     '{"complexity": 2, "monosemanticity": 2}', "{", ""],
)  # fmt: skip
def test_malformed_ratings_are_counted_and_never_guessed(server, tmp_path, answer):
    server.script = [answer]
    [found] = judge(chat_of(server, tmp_path), [shown()], seed=0)
    assert found.rating is None
    assert np.isnan(found.detection)
    assert np.isnan(found.fuzzing)
    assert found.malformed == 1


def test_tests_that_name_texts_that_are_not_there_are_malformed(server, tmp_path):
    server.script = [GOOD, '{"active": [1, 99]}', '```json\n{"active": []}\n```']
    [found] = judge(chat_of(server, tmp_path), [shown()], seed=0)
    assert np.isnan(found.detection)
    assert found.fuzzing == 0.5
    assert found.malformed == 1


def test_the_cost_counts_what_is_asked_of_explanations_too(server, tmp_path, monkeypatch):
    chat, told = chat_of(server, tmp_path), []
    monkeypatch.setattr(chat, "tell_cost", lambda asked: told.append(CachedChat.tell_cost(chat, asked)))
    judge(chat, [shown(), shown("cats")], seed=0)
    judge(chat, [shown(), shown("cats")], seed=0)
    assert [requests for requests, _ in told] == [len(server.asked), 0] == [6, 0]


def test_what_cannot_be_tested_is_not_malformed(server, tmp_path):
    [found] = judge(chat_of(server, tmp_path), [shown()._replace(silent=[], misplaced=[])], seed=0)
    assert found.rating is not None
    assert np.isnan(found.detection)
    assert np.isnan(found.fuzzing)
    assert found.malformed == 0
    assert len(server.asked) == 1


def test_a_local_model_answers_alike_each_time(corpus, tmp_path):
    tiny_model("gpt2", vocab_size=300, context=400).hf.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(corpus / "tokenizer")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(StudyError, match="has no chat template"):
        LocalChat(str(tmp_path))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "a model learns"}]
    answers = {LocalChat(str(tmp_path), max_new_tokens=5).ask(messages) for _ in range(2)}
    assert len(answers) == 1
    [answer] = answers
    assert answer
    assert "a model learns" not in answer


def test_answers_are_read_with_or_without_a_fence():
    assert parse(Chosen, '```json\n{"active": [2]}\n```') == parse(Chosen, ' {"active": [2]} ') == Chosen(active=[2])
    assert parse(Chosen, 'Sure: {"active": [2]}') is None
    assert parse(Chosen, '{"active": ["2"]}') is None


def test_the_endpoint_comes_from_the_environment(monkeypatch):
    for name in ("OPENAI_BASE_URL", "UNIVERSALITY_JUDGE_MODEL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StudyError, match="the environment has no OPENAI_BASE_URL"):
        Endpoint.of_environment()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://x/v1")
    with pytest.raises(StudyError, match="UNIVERSALITY_JUDGE_MODEL"):
        Endpoint.of_environment()
    monkeypatch.setenv("UNIVERSALITY_JUDGE_MODEL", "m")
    assert Endpoint.of_environment() == Endpoint("http://x/v1", "m", None)
