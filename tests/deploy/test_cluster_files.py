"""The files that start clusters are what Ray takes, and keep to what the guide says of them."""

import json
from pathlib import Path

import jsonschema
import ray
import yaml

from serving.app_config import AppConfig
from serving.models import KNOWN_MODELS

ROOT = Path(__file__).parents[2]
LAUNCHER = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def test_the_cluster_file_fits_rays_own_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(LAUNCHER, schema)


def test_the_head_has_no_gpu_and_workers_scale_from_none_on_spot() -> None:
    types = LAUNCHER["available_node_types"]
    assert "GPU" not in types[LAUNCHER["head_node_type"]]["resources"]
    workers = [t for name, t in types.items() if name != LAUNCHER["head_node_type"]]
    assert workers
    for worker in workers:
        assert (worker["min_workers"], worker["resources"]["GPU"] > 0) == (0, True)
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_no_port_but_ssh_is_open_and_that_to_private_addresses_alone() -> None:
    for rule in LAUNCHER["provider"]["security_group"]["IpPermissions"]:
        assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
        assert all(entry["CidrIp"].startswith("10.") for entry in rule["IpRanges"])


def test_the_fleets_file_names_a_known_model_and_known_settings() -> None:
    (application,) = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())["applications"]
    assert application["import_path"] == "serving.app:build_app"
    assert AppConfig.parse(application["args"]).model in KNOWN_MODELS


def test_every_node_asks_for_rays_token_and_has_it() -> None:
    """Ray starts no node that asks for a token and finds none in its user's home."""
    starts = [*LAUNCHER["head_start_ray_commands"], *LAUNCHER["worker_start_ray_commands"]]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert LAUNCHER["file_mounts"][f"/home/{LAUNCHER['auth']['ssh_user']}/.ray/auth_token"] == "~/.ray/auth_token"
