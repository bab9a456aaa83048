"""Objects of an S3-compatible bucket, read with their versions and written on conditions."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskstore.errors import BucketUnreachable

SCHEME = "s3://"
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 5, 60, 3
# S3's codes when the object is another by now, or is being replaced, and their HTTP statuses
_CONFLICTS = {"PreconditionFailed", "ConditionalRequestConflict", "OperationAborted", "412", "409"}


class VersionConflict(Exception):
    """The object is not the version that was to be replaced."""


class S3Bucket:
    """The objects below `s3://bucket/prefix`, by name. Thread-safe.

    Credentials and endpoint are those of AWS's environment variables and files (`AWS_ACCESS_KEY_ID`,
    `AWS_ENDPOINT_URL` and so on). A version is S3's ETag. The service must support conditional writes (`If-Match`,
    `If-None-Match`), as AWS, MinIO, Ceph and R2 do. Every method raises `BucketUnreachable` if the service cannot be
    reached or refuses.
    """

    def __init__(self, url: str) -> None:
        try:
            from s3fs import S3FileSystem
        except ImportError as error:
            raise BucketUnreachable(f"{url} needs s3fs ({error}); pip install 'masquerade[s3]'") from error
        self.url = url.rstrip("/")
        self._name, _, prefix = self.url.removeprefix(SCHEME).partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._service: Any = S3FileSystem(
            use_listings_cache=False,
            skip_instance_cache=True,  # whose key does not include the endpoint of the environment
            config_kwargs={
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": READ_SECONDS,
                "retries": {"max_attempts": ATTEMPTS},
            },
        )

    def version(self, name: str) -> str | None:
        """The object's version; None if there is none."""
        with self._explaining():
            try:
                found = self._service.call_s3("head_object", Bucket=self._name, Key=self._prefix + name)
            except FileNotFoundError:
                return None
            version: str = found["ETag"]
            return version

    def read(self, name: str) -> tuple[bytes, str] | None:
        """The object's content and version; None if there is none."""
        with self._explaining():
            while (version := self.version(name)) is not None:
                try:
                    content: bytes = self._service.cat_file(self._path(name))
                except FileNotFoundError:
                    continue
                if self.version(name) == version:
                    return content, version
        return None

    def write(self, name: str, content: bytes, version: str | None) -> str:
        """Replace this version of the object, or create it (None); return the new version.

        Raises `VersionConflict`, and changes nothing, if the object is another. One of this content is no other: the
        response to an attempt may have been lost.
        """
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with self._explaining():
            try:
                found = self._service.call_s3(
                    "put_object", Bucket=self._name, Key=self._prefix + name, Body=content, **condition
                )
            except FileNotFoundError as error:
                if version is None:  # then it is the bucket that does not exist
                    raise
                raise VersionConflict(name) from error
            except OSError as error:
                if not _is_conflict(error):
                    raise
                if (found := self.read(name)) is None or found[0] != content:
                    raise VersionConflict(name) from error
                return found[1]
            written: str = found["ETag"]
            return written

    def delete(self, name: str) -> None:
        """Delete the object, if it is there."""
        with self._explaining():
            self._service.call_s3("delete_object", Bucket=self._name, Key=self._prefix + name)

    def upload(self, path: Path, name: str) -> None:
        """Create or replace the object with a file's content."""
        with self._explaining():
            self._service.put_file(str(path), self._path(name))

    def download(self, name: str, path: Path) -> bool:
        """Write the object's content to a file; False if there is none."""
        with self._explaining():
            try:
                self._service.get_file(self._path(name), str(path))
            except FileNotFoundError:
                return False
        return True

    def list(self, folder: str) -> dict[str, tuple[float, int]]:
        """The names of the objects below a folder, with the time of their last change (Unix) and their bytes."""
        with self._explaining():
            found = self._service.find(self._path(folder), detail=True)
        start = len(self._path(""))
        return {path[start:]: (one["LastModified"].timestamp(), one["size"]) for path, one in found.items()}

    def _path(self, name: str) -> str:
        return f"{self._name}/{self._prefix}{name}"

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except (BucketUnreachable, VersionConflict):
            raise
        except Exception as error:  # botocore, aiobotocore and aiohttp have a tree of errors each
            raise BucketUnreachable(f"{self.url}: {str(error) or type(error).__name__}") from error


def _is_conflict(error: BaseException) -> bool:
    cause = error.__cause__
    response = getattr(cause or error, "response", None)
    code = str(response.get("Error", {}).get("Code")) if isinstance(response, dict) else ""
    return code in _CONFLICTS


def make_token() -> bytes:
    """A content that no other object has, so that its version is its own."""
    return uuid.uuid4().hex.encode()
