"""A put that succeeds only where nothing lies yet: ``If-None-Match: *`` on S3 and its kin, ``create`` elsewhere.

pyarrow has no conditional put, so this one operation goes through obstore (S3, Google Cloud Storage, Azure) or fsspec.
"""

from datetime import timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qs, urlsplit

OBJECT_STORES = ("s3", "gs", "gcs", "abfs", "abfss", "az")


def put_new(uri: str, path: str, data: bytes) -> bool:
    """Create ``path`` (bucket and key) on the store of ``uri``; False when it is there. Raises ``OSError``."""
    if uri.split("://", 1)[0] not in OBJECT_STORES:
        return _fsspec_put_new(uri, path, data)
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError

    bucket, key = path.split("/", 1)
    store = _store(uri, bucket)
    try:
        try:
            obstore.put(store, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            # A put whose answer was lost is repeated by the client: what lies there may be ours.
            return bytes(obstore.get(store, key).bytes()) == data
    except BaseError as error:
        raise OSError(str(error).split("\n\nDebug source")[0]) from error
    return True


def _fsspec_put_new(uri: str, path: str, data: bytes) -> bool:
    import fsspec

    fs, _ = fsspec.url_to_fs(uri)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


@lru_cache(maxsize=16)
def _store(uri: str, bucket: str) -> Any:
    """The store of a URI as pyarrow reads it: options in the query, credentials in the URI or the environment."""
    from obstore.store import from_url

    parts = urlsplit(uri)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    options: dict[str, Any] = {"retry_config": {"max_retries": 2, "retry_timeout": timedelta(seconds=20)}}
    endpoint = query.get("endpoint_override")
    if endpoint:
        options["endpoint"] = endpoint if "://" in endpoint else f"{query.get('scheme', 'https')}://{endpoint}"
    if "region" in query:
        options["region"] = query["region"]
    if parts.username and parts.password:
        options |= {"access_key_id": parts.username, "secret_access_key": parts.password}
    elif parts.scheme == "s3" and (provider := _boto3_credentials()) is not None:
        options["credential_provider"] = provider
    scheme = "gs" if parts.scheme == "gcs" else parts.scheme
    return from_url(f"{scheme}://{bucket}", client_options={"allow_http": True}, **options)


def _boto3_credentials() -> Any:
    """Credentials from profiles and configuration files, as pyarrow finds them, where boto3 is installed."""
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return None
    try:
        return Boto3CredentialProvider()
    except ValueError:
        return None
