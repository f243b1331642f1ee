"""What Ollama's clients ask of a server before they use it: its models, what one of them can do, its version."""

import hashlib
import importlib.metadata
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict

from serving.api.ask import ServedModel, Service
from serving.api.bodies import JsonRoute
from serving.api.fields import Name
from serving.api.listing import usable
from serving.api.parts import WhoCalls
from serving.api.replies import POSTED, READ, OllamaErrorReply, documented
from serving.tenants.caller import Caller

TAG = ":latest"
"""The tag that Ollama's clients may put behind a name that has none."""

TEMPLATE = "{{ .Prompt }}{{ .Suffix }}"
"""Not used; Continue looks for ``.Suffix`` in it to learn whether a model can infill."""


class ShowRequest(BaseModel):
    """The model to describe, the default where none is named; older clients send ``name``."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: Name | None = None
    name: Name | None = None


class Details(BaseModel):
    """What Ollama tells of a model's kind; what it would tell of quantisation is empty."""

    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str = ""
    quantization_level: str = ""


class Tag(BaseModel):
    """A model in the list; its ``size`` is not told, and ``digest`` is its name's."""

    name: str
    model: str
    modified_at: str
    size: int = 0
    digest: str
    details: Details


class Tags(BaseModel):
    """The models that a key may use."""

    models: list[Tag]


class Shown(BaseModel):
    """A model; ``parameters`` and ``template`` are in the language of Ollama's own files."""

    license: str
    notice: str
    modelfile: str = ""
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Version(BaseModel):
    """The version of spanfill."""

    version: str


def rfc3339(moment: datetime) -> str:
    """A time in UTC as Ollama writes it."""
    return moment.isoformat().replace("+00:00", "Z")


def _created(model: ServedModel) -> str:
    return rfc3339(datetime.fromtimestamp(model.created, UTC))


def _details(model: ServedModel) -> Details:
    return Details(format="safetensors", family=model.format, families=[model.format])


def _tag(model: ServedModel) -> Tag:
    return Tag(
        name=model.name,
        model=model.name,
        modified_at=_created(model),
        digest=hashlib.sha256(model.name.encode()).hexdigest(),
        details=_details(model),
    )


def _shown(model: ServedModel) -> Shown:
    return Shown(
        license=model.licence or "",
        notice=model.notice or "",
        parameters=f"num_ctx {model.context}",
        template=TEMPLATE if model.can_infill else "{{ .Prompt }}",
        details=_details(model),
        model_info={"general.architecture": model.format, f"{model.format}.context_length": model.context},
        capabilities=["completion", "insert"] if model.can_infill else ["completion"],
        modified_at=_created(model),
    )


def router(service: Service, caller: WhoCalls) -> APIRouter:
    """The routes; ``caller`` is the dependency that tells who calls."""
    routes = APIRouter(route_class=JsonRoute)
    told = documented(*READ, model=OllamaErrorReply)

    @routes.get("/api/tags", response_model=Tags, responses=told)
    async def tags(who: Annotated[Caller, Depends(caller)]) -> Tags:
        """The models that the key may use, the default first."""
        return Tags(models=[_tag(model) for model in usable(service, who)])

    @routes.post("/api/show", response_model=Shown, responses=documented(*POSTED, model=OllamaErrorReply))
    async def show(sent: ShowRequest, who: Annotated[Caller, Depends(caller)]) -> Shown:
        """One model: its licence, context and whether it can infill."""
        return _shown(service.model((sent.model or sent.name or "").removesuffix(TAG), who))

    @routes.get("/api/version", response_model=Version, responses=told)
    async def version(who: Annotated[Caller, Depends(caller)]) -> Version:
        """The version of spanfill."""
        return Version(version=importlib.metadata.version("spanfill"))

    return routes
