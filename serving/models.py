"""The known models, and what any other folder or hub id is taken for."""

import difflib
import json
import re
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from serving.config import EngineConfig, EngineKind, RooflineConfig
from serving.errors import ModelError
from serving.shapes import ModelShape, read_shape, shape_of

CITATION = (
    "Nijkamp, Hayashi, Xiong, Savarese, Zhou: CodeGen2: Lessons for Training LLMs on Programming and Natural "
    "Languages. ICLR 2023, arXiv:2305.02309"
)
STARCODER_SEARCH = "https://huggingface.co/spaces/bigcode/starcoder-search"
KV_BYTES_PER_TOKEN = 2 * 32 * 4_096 * 2
"""CodeGen2.5-7B in bf16: keys and values, 32 layers, hidden 4096, 2 bytes."""

CODEGEN25_7B = shape_of(
    {"hidden_size": 4_096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11_008}
    | {"vocab_size": 51_200},
    name="CodeGen2.5-7B",
)


@dataclass(frozen=True)
class Model:
    """What is known of a model; sizes in bytes, context in tokens."""

    name: str
    format: str
    context: int
    dtype: str = "auto"
    path: Path | None = None
    hub_id: str | None = None
    revision: str | None = None
    licence: str | None = None
    notice: str | None = None
    training_data: str | None = None
    attribution: str | None = None
    citation: str | None = None
    download_bytes: int | None = None
    memory_bytes: int | None = None
    shape: ModelShape | None = None

    def engine_config(
        self,
        *,
        kind: EngineKind = "vllm",
        dtype: str | None = None,
        max_model_len: int | None = None,
        tensor_parallel_size: int = 1,
        engine_args: dict[str, Any] | None = None,
    ) -> EngineConfig:
        """An engine of this model, at its own dtype and context unless told otherwise; raises ``ConfigError``.

        ``engine_args`` are vLLM's, or the fields of ``RooflineConfig`` for an engine that is simulated.
        """
        arguments = engine_args or {}
        roofline = RooflineConfig()
        if kind != "vllm":
            roofline, arguments = RooflineConfig.parse(arguments, where=f"engine_args of the {kind} engine"), {}
        return EngineConfig.parse(
            {
                "kind": kind,
                "model": str(self.path or self.hub_id),
                "revision": self.revision,
                "dtype": dtype or self.dtype,
                "max_model_len": max_model_len or self.context,
                "tensor_parallel_size": tensor_parallel_size,
                "engine_args": arguments,
                "roofline": roofline,
            }
        )


def _codegen25(variant: str, data: str, *, licence: str = "Apache-2.0", notice: str | None = None) -> Model:
    hub_id = f"Salesforce/codegen25-7b-{variant}_P"
    return Model(
        name=f"codegen25-7b-{variant}",
        format="codegen25",
        context=2_048,
        dtype="bfloat16",
        hub_id=hub_id,
        licence=licence,
        notice=notice,
        training_data=data,
        attribution=f"may repeat training code verbatim, whose licence may ask for attribution: {STARCODER_SEARCH}",
        citation=CITATION,
        download_bytes=27_600_000_000,
        memory_bytes=13_800_000_000,
        shape=CODEGEN25_7B,
    )


KNOWN_MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            name="demo-codegen25",
            format="codegen25",
            context=1_024,
            dtype="bfloat16",
            licence="Apache-2.0 (weights); trained on the Python standard library, PSF-2.0",
            notice="demo-codegen25 is a toy of 12 million parameters: it shows the format, not CodeGen2.5's skill.",
            training_data="Python 3.11 standard library without tests, 5 % of modules held out (PSF-2.0)",
        ),
        _codegen25("multi", "StarCoderData, 1.4 trillion tokens"),
        _codegen25("mono", "StarCoderData, then more Python"),
        _codegen25(
            "instruct",
            "as mono, then public instruction data sets",
            licence="for research purposes only",
            notice="codegen25-7b-instruct is for research only: its licence and instruction data exclude other use.",
        ),
    )
}


def resolve_model(
    model: str,
    *,
    format: str | None = None,  # noqa: A002
    revision: str | None = None,
    weights: bool = True,
) -> Model:
    """The model of a known name, a folder with ``config.json`` and weights, or a hub id ``organisation/name``.

    Nothing is fetched. ``format`` overrides what the model's configuration tells; a folder needs no weights where
    ``weights`` is False: nothing reads them. Raises ``ModelError`` naming what is missing and what to do.
    """
    found = find_model(model, revision=revision, weights=weights)
    if format or found.format:
        return replace(found, format=format or found.format)
    raise ModelError(f"{model}: its configuration does not tell its infill format.", remedy="Name it with --format.")


def find_model(model: str, *, revision: str | None = None, weights: bool = True) -> Model:
    """As ``resolve_model``; its format is empty where its configuration does not tell it."""
    found = _found(model, weights)
    return replace(found, revision=revision) if revision else found


def _found(model: str, weights: bool) -> Model:
    if model in KNOWN_MODELS:
        known = KNOWN_MODELS[model]
        return known if known.hub_id else replace(known, path=_packaged(known.name))
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path.absolute(), weights)
    if model.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        close = difflib.get_close_matches(model, KNOWN_MODELS, n=2)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Known names: {', '.join(KNOWN_MODELS)}."
        raise ModelError(f"{model} is no known model, no folder and no hub id.", remedy=hint)
    return Model(name=model, hub_id=model, format=guess_format(model, {}), context=2_048)


def _packaged(name: str) -> Path:
    path = Path(str(resources.files("serving").joinpath("data", name)))
    if not (path / "config.json").is_file():
        raise ModelError(f"{name} is not part of this installation.", remedy="Install spanfill with its package data.")
    return path


def _folder(path: Path, weights: bool) -> Model:
    config = path / "config.json"
    if not config.is_file():
        raise ModelError(f"{path} has no config.json.", remedy="Give the folder that holds the model.")
    if weights and not [*path.glob("*.safetensors"), *path.glob("*.bin"), *path.glob("*.pt")]:
        raise ModelError(f"{path} has no weights (*.safetensors or *.bin).", remedy="Complete the download.")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config} is not JSON: {error}.", remedy="Write it again.") from None
    context = int(values.get("max_position_embeddings") or 2_048)
    return Model(name=path.name, path=path, format=guess_format(path.name, values), context=context)


FORMAT_HINTS = (
    ("codegen25|codegen2_5|codegen2.5", "codegen25"),
    ("codegen2", "codegen2"),
    ("starcoder2", "starcoder2"),
    ("starcoder|santacoder|granite.*code", "starcoder"),
    ("qwen2.5-coder|codeqwen", "qwen2.5-coder"),
    ("deepseek.*coder", "deepseek-coder"),
    ("codellama|code-llama", "codellama"),
    ("codestral", "codestral"),
    ("codegemma", "codegemma"),
    ("seed-coder", "seed-coder"),
)


def guess_format(name: str, config: dict[str, Any]) -> str:
    """The format that a model's name or configuration tells, or an empty string."""
    if config.get("model_type") == "llama" and config.get("vocab_size") == 51_200:
        return "codegen25"
    told = f"{name} {config.get('_name_or_path', '')} {config.get('model_type', '')}".lower()
    return next((fmt for pattern, fmt in FORMAT_HINTS if re.search(pattern, told)), "")


def download_notice(model: Model) -> str | None:
    """What a download will take, or None when nothing is known or the files are in the hub's cache already."""
    if not model.hub_id or not model.download_bytes or not model.memory_bytes or _cached_config(model):
        return None
    per_token = KV_BYTES_PER_TOKEN / 2**10
    return (
        f"{model.name} will be fetched from {model.hub_id}: {model.download_bytes / 1e9:.1f} GB on disk (sharded "
        f"FP32 PyTorch files, republished by a third party, unverified), {model.memory_bytes / 1e9:.1f} GB of "
        f"memory for the weights in bf16, and {per_token:.0f} KiB of KV cache a token."
    )


def _cached_config(model: Model) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(model.hub_id), "config.json", revision=model.revision)
    return Path(found) if isinstance(found, str) else None


def model_shape(model: Model) -> ModelShape:
    """What a model weighs: as known, else by the ``config.json`` of its folder or of the hub's cache.

    Nothing is fetched. Raises ``ModelError`` where there is none, or none that tells.
    """
    if model.shape is not None:
        return model.shape
    config = model.path / "config.json" if model.path else _cached_config(model)
    if config is None:
        raise ModelError(
            f"{model.name}: its size is not known before its config.json is in the hub's cache.",
            remedy=f"Fetch it: hf download {model.hub_id} config.json",
        )
    return read_shape(config, name=model.name)


def describe(model: Model) -> dict[str, str]:
    """What ``spanfill models`` shows of a model."""
    sizes = {"disk": model.download_bytes, "memory for weights": model.memory_bytes}
    told = {
        "source": f"{model.hub_id} (unverified third-party copy)" if model.hub_id else "part of spanfill",
        "licence": model.licence,
        "notice": model.notice,
        "training data": model.training_data,
        "attribution": model.attribution,
        "citation": model.citation,
        "format": model.format,
        "context": f"{model.context:,} tokens",
        "dtype": model.dtype,
        **{name: f"{size / 1e9:.1f} GB" for name, size in sizes.items() if size},
    }
    return {key: value for key, value in told.items() if value}
