"""The models as OpenAI's clients list them, with what vLLM, OpenRouter and a careful user look for."""

from typing import Literal

from pydantic import BaseModel

from serving.api.ask import ServedModel, Service
from serving.tenants.caller import Caller


class ModelCard(BaseModel):
    """A model: its context in tokens under the names that clients look for, its licence and what to know of it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "spanfill"
    max_model_len: int
    context_length: int
    format: str
    infill: bool
    licence: str | None
    notice: str | None


class ModelCards(BaseModel):
    """The models that a key may use."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def card_of(model: ServedModel) -> ModelCard:
    """What is told of a model."""
    return ModelCard(
        id=model.name,
        created=model.created,
        max_model_len=model.context,
        context_length=model.context,
        format=model.format,
        infill=model.can_infill,
        licence=model.licence,
        notice=model.notice,
    )


def usable(service: Service, who: Caller) -> list[ServedModel]:
    """The models that a caller may use, the default first."""
    return [model for model in service.models if who.models is None or model.name in who.models]
