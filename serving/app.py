"""Assembly: one configuration -> one Ray Serve application of replicas. The only place that puts it together."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from serving.app_config import AppConfig, function_of
from serving.config import EngineConfig, ReplicaConfig
from serving.engine_args import is_gpu_build
from serving.replica import Replica
from serving.router import LaneRouter
from serving.weights import resolve_revision

APP = "spanfill"
"""The name of the application that ``deploy/serve.yaml`` and ``spanfill serve`` run."""

DEPLOYMENT = "Replica"
QUIET = {"log_level": "WARNING", "enable_access_log": False}
GPU_ROWS_BESIDE, CPU_ROWS_BESIDE = 4, 1
"""Batch rows that go on in an engine while it serves people, unless told otherwise: on a CPU each slows every step."""

GATEWAY_CORES = 0.0
"""What a gateway asks of Ray: nothing, since without GPUs the replicas are given all cores of their node."""

GATEWAY_REQUESTS = 2_000
"""At once in a gateway; as many more wait before it, and beyond Serve answers 503."""

HEALTH_CHECK_PERIOD_S = 1.0
"""Serve starts a replica again after three failed checks in a row."""

HEALTH_CHECK_TIMEOUT_S = 30.0
SIMULATED_CORES = 0.001
"""What a simulated replica asks of Ray: enough to be counted, so little that hundreds fit a laptop."""


def build(engine: EngineConfig, replica: ReplicaConfig) -> Application:
    """The replicas: ``replica.replicas`` of one engine, each with cores or GPUs of its own.

    A replica's resources are one placement-group bundle, so that the ranks of a tensor-parallel engine share a node.
    """
    bundle: dict[str, float] = {"CPU": _cores(engine, replica)}
    if replica.use_gpu and engine.kind == "vllm":
        bundle["GPU"] = engine.tensor_parallel_size
    deployment = serve.deployment(
        Replica,
        name=DEPLOYMENT,
        num_replicas=replica.replicas,
        ray_actor_options={"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0)},
        placement_group_bundles=[bundle],
        placement_group_strategy="STRICT_PACK",
        max_ongoing_requests=replica.max_ongoing_requests,
        graceful_shutdown_timeout_s=replica.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        max_constructor_retry_count=2,
        request_router_config=RequestRouterConfig(request_router_class=LaneRouter),
        logging_config=QUIET,
    )
    return deployment.bind(engine, replica)


def with_gateways(replicas: Application, config: AppConfig, replica: ReplicaConfig, *, app: str) -> Application:
    """The application ``app``, which answers HTTP with its replicas; raises ``ConfigError``, ``ModelError``."""
    from serving.api.gateway import Gateway, GatewayConfig, served

    model = config.resolved
    engine = config.engine_config()
    told = GatewayConfig(
        app=app,
        model=config.model,
        tokenizer=config.model,
        format=model.format,
        replicas=replica.replicas,
        open_until_tenants=config.open_until_tenants,
    )
    for name in config.routes:
        function_of(name)
    deployment = serve.deployment(
        serve.ingress()(Gateway),
        name="Gateway",
        num_replicas=config.gateways,
        ray_actor_options={"num_cpus": GATEWAY_CORES},
        max_ongoing_requests=GATEWAY_REQUESTS,
        max_queued_requests=GATEWAY_REQUESTS,
        graceful_shutdown_timeout_s=replica.drain_seconds,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        logging_config=QUIET,
    )
    return deployment.bind(replicas, told, served(model, config.model, engine.max_model_len), config)


def _cores(engine: EngineConfig, replica: ReplicaConfig) -> float:
    if engine.kind != "vllm":
        return SIMULATED_CORES
    return float(max(1, replica.cores))


def build_app(args: dict[str, Any]) -> Application:
    """For ``serve run deploy/serve.yaml``: validate the file's arguments and build; raises ``ConfigError``."""
    return assemble(AppConfig.parse(args, where="serve.yaml args"), app=APP)


def pinned(config: AppConfig) -> AppConfig:
    """The same with the commit that a hub's revision stands for now: jobs ask for that, and join by it."""
    if config.engine != "vllm":
        return config
    return config.model_copy(update={"revision": resolve_revision(config.resolved)})


def assemble(config: AppConfig, *, app: str) -> Application:
    """The replicas, behind gateways if there are to be some, placed on the nodes that are alive now.

    Raises ``ConfigError``, for gateways on several nodes with an embedded database too, and ``ModelError``.
    """
    import ray

    from serving.api.gateway import check_database

    config = pinned(config)
    if config.gateways:
        check_database()
    replica = place(config.replicas, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if config.gateways and replica.rows_beside is None:
        on_cpu = config.engine == "vllm" and not replica.use_gpu
        replica = replica.model_copy(update={"rows_beside": CPU_ROWS_BESIDE if on_cpu else GPU_ROWS_BESIDE})
    replicas = build(config.engine_config(), replica)
    return with_gateways(replicas, config, replica, app=app) if config.gateways else replicas


def place(replica: ReplicaConfig, nodes: list[dict[str, float]]) -> ReplicaConfig:
    """Decide GPUs or cores from the resources of the live nodes where the configuration leaves it open.

    GPUs where a node has some, or where vLLM's GPU build is installed: the nodes may be yet to come. On CPUs the
    replicas are dealt over the nodes and each gets an equal share of its node's cores.
    """
    use_gpu = replica.use_gpu or is_gpu_build() or any(node.get("GPU", 0) for node in nodes)
    if replica.cores or use_gpu:
        return replica.model_copy(update={"use_gpu": use_gpu})
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    share = max(cores)
    while share > 1 and sum(c // share for c in cores) < replica.replicas:
        share -= 1
    return replica.model_copy(update={"cores": share})
