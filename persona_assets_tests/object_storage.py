"""An S3-protocol server on loopback, for what several machines share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

BUCKET = "experiments"
URL = f"s3://{BUCKET}/persona"


@dataclass(frozen=True)
class ObjectStorage:
    """The server: where it is, how it is reached, and what is in its bucket."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use it."""
        return {
            "PERSONA_ASSETS_STORE": URL,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def client(self) -> Any:
        """Amazon's own client: what the tests look with is not what they test."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )

    def objects(self) -> list[str]:
        """The keys of all objects below :data:`URL`, relative to it."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        found = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return sorted(key.removeprefix("persona/") for key in found)

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=f"persona/{key}")["Body"].read()

    def write(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=f"persona/{key}", Body=content)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=f"persona/{key}")


def forget_servers() -> None:
    """Have this process ask its environment again where the storage is, which it does once."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def object_storage() -> Iterator[ObjectStorage]:
    """A running server with one empty bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        storage = ObjectStorage(f"http://{host}:{port}")
        storage.client.create_bucket(Bucket=BUCKET)
        yield storage
    finally:
        server.stop()
