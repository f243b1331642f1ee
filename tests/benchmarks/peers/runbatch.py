"""vLLM's ``run-batch``. It serves chat completions only, so the prompts travel as text of a tokenizer made for it.

Its tokenizer has one word for each token id, written in decimal, and its chat template is the message and nothing else:
the engine sees the very ids of the other contestants. What differs: text is tokenised and detokenised, which is cheaper
here than any real tokenizer, and a JSON file is read and written; both are inside its busy seconds.
"""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs.process import since_birth
from serving.formats import load_format
from serving.tokenizer import VOCAB_SIZE
from tests.benchmarks.peers.figures import Measured, until_stop
from tests.benchmarks.peers.inputs import FORMAT, Row, make_prompts
from tests.benchmarks.peers.setting import Setting

TEMPLATE = "{{ messages[0].content }}"
NOTE = "chat completions of decimal token ids: the same prompts, with a word-level tokenizer and JSON files in between"


def run_runbatch(rows: list[Row], setting: Setting) -> Measured:
    """Write the batch file, start the engine as ``run-batch`` does, and let it work through the file."""
    prompts, stops = make_prompts(rows, setting, align=1), load_format(FORMAT).stop_token_ids
    with tempfile.TemporaryDirectory(prefix="spanfill-runbatch-") as folder:
        source, answered = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        source.write_text("".join(_line(row, prompt, setting, stops) for row, prompt in enumerate(prompts)))
        startup, busy = asyncio.run(_serve(_arguments(setting, source, answered, Path(folder)), setting))
        answers = [json.loads(line) for line in answered.read_text().splitlines()]
    return _measured(startup, busy, prompts, answers, stops)


def _line(row: int, prompt: list[int], setting: Setting, stops: tuple[int, ...]) -> str:
    body = {
        "model": setting.model,
        "messages": [{"role": "user", "content": " ".join(map(str, prompt))}],
        "max_completion_tokens": setting.max_tokens,
        "temperature": 0,
        "seed": 0,
        "stop_token_ids": list(stops),
        "return_token_ids": True,
    }
    line = {"custom_id": str(row), "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line) + "\n"


def _arguments(setting: Setting, source: Path, answered: Path, folder: Path) -> Any:
    """What ``vllm run-batch`` parses from its command line."""
    from vllm.entrypoints.launchers.run_batch import parse_args

    given = setting.engine_arguments() | {"tokenizer": str(_tokenizer(folder / "tokenizer")), "chat_template": TEMPLATE}
    given |= {"input_file": str(source), "output_file": str(answered), "enable_prompt_tokens_details": True}
    given["skip_tokenizer_init"] = False
    sys.argv = ["run-batch", *(text for key, value in given.items() for text in _option(key, value))]
    return parse_args()


def _option(key: str, value: Any) -> list[str]:
    name = key.replace("_", "-")
    short = {"input-file": "-i", "output-file": "-o"}.get(name, f"--{name}")
    if isinstance(value, bool):
        return [short if value else f"--no-{name}"]
    return [short, str(value)]


def _tokenizer(folder: Path) -> Path:
    """A tokenizer whose words are the ids 0 to 51,199 in decimal."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB_SIZE)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


async def _serve(arguments: Any, setting: Setting) -> tuple[float, float]:
    """Seconds of start-up and of work, told apart where ``run-batch``'s own ``main`` begins to read its file."""
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.run_batch import run_batch
    from vllm.usage.usage_lib import UsageContext

    async with build_async_engine_client(arguments, usage_context=UsageContext.OPENAI_BATCH_RUNNER) as client:
        startup, started = since_birth(), time.monotonic()
        await run_batch(client, arguments)
        return startup, time.monotonic() - started


def _measured(
    startup: float, busy: float, prompts: list[list[int]], answers: list[Any], stops: tuple[int, ...]
) -> Measured:
    outputs, cached, different, errors = dict[int, list[int]](), 0, 0, 0
    for answer in answers:
        row, body = int(answer["custom_id"]), (answer["response"] or {}).get("body")
        if answer["error"] or not body:
            errors += 1
            continue
        outputs[row] = until_stop(body["choices"][0]["token_ids"], stops)
        cached += (body["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        different += body["prompt_token_ids"] != prompts[row]
    return Measured(startup, busy, prompts, outputs, cached, different=different, errors=errors, note=NOTE)
