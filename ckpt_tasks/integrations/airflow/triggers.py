"""The trigger behind a deferred `CheckpointSensor`.

Triggers share one process and its event loop, so this one neither looks for itself, which
blocks, nor puts credentials into that process' environment: it starts a process for each look.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
from airflow.triggers.base import BaseTrigger, TriggerEvent
from asgiref.sync import sync_to_async

from ckpt_tasks.config import CheckpointConfig, RegistryConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.integrations.airflow.assets import checkpoint_extra
from ckpt_tasks.integrations.airflow.configuration import Settings
from ckpt_tasks.integrations.airflow.connections import split_connection
from ckpt_tasks.masking import mask_url
from ckpt_tasks.tasks.find import FindAnswer, FindRequest, WantedCheckpoint

__all__ = ["CheckpointTrigger"]

_COMMAND = (sys.executable, "-m", "ckpt_tasks.tasks.find")
_LOOK_SECONDS = 300.0  # after which a look is given up, and another one begun
_SHOWN_OF_OUTPUT = 2000


class CheckpointTrigger(BaseTrigger):
    """Fires when a checkpoint is there, or when looking for it can never work.

    The event's payload has ``found``, the checkpoint, or ``error``. What Airflow's database
    keeps of a trigger are the ids of connections, never what is in them.

    Parameters
    ----------
    wanted
        A `WantedCheckpoint` as builtins.
    settings
        Fields of `Settings`: ``store``, ``ckpt_conn_id``, ``mlflow_conn_id``, ``registry``.
    base
        The worker's own configuration as builtins: the triggerer's may be another.
    poll_interval
        Seconds between two looks.
    """

    def __init__(
        self,
        wanted: dict[str, Any],
        settings: dict[str, Any],
        base: dict[str, Any],
        poll_interval: float,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.wanted = wanted
        self.settings = settings
        self.base = base
        self.poll_interval = poll_interval

    @classmethod
    def of(
        cls,
        wanted: WantedCheckpoint,
        settings: Settings,
        base: CheckpointConfig,
        poll_interval: float,
    ) -> CheckpointTrigger:
        """The trigger for these settings.

        Raises
        ------
        ConfigError
            An address has credentials in it, which would be written to Airflow's database.
        """
        for address in _addresses(settings, base):
            if mask_url(address) != address:
                raise ConfigError(
                    f"{mask_url(address)} has credentials in it, which a deferred sensor would "
                    "write to Airflow's database; put them in a connection (ckpt_conn_id, "
                    "mlflow_conn_id), or say deferrable=False"
                )
        given = {
            field.name: msgspec.to_builtins(getattr(settings, field.name))
            for field in dataclasses.fields(settings)
            if field.name in ("store", "ckpt_conn_id", "mlflow_conn_id", "registry")
        }
        return cls(
            wanted=msgspec.to_builtins(wanted),
            settings=given,
            base=msgspec.to_builtins(base),
            poll_interval=poll_interval,
        )

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Class and arguments, as Airflow's database keeps them."""
        return f"{type(self).__module__}.{type(self).__qualname__}", {
            "wanted": self.wanted,
            "settings": self.settings,
            "base": self.base,
            "poll_interval": self.poll_interval,
        }

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look, wait, look again."""
        wanted = msgspec.convert(self.wanted, WantedCheckpoint)
        while True:
            answer = await self._look(wanted)
            if answer.found is not None:
                yield _event({"found": checkpoint_extra(answer.found)})
                return
            if answer.error is not None and not answer.retryable:
                yield _event({"error": answer.error})
                return
            if answer.error is not None:
                self.log.warning("could not look for %s: %s", wanted, answer.error)
            await asyncio.sleep(self.poll_interval)

    async def _look(self, wanted: WantedCheckpoint) -> FindAnswer:
        # Connections are asked for again each time: a key may have been replaced meanwhile.
        try:
            config, credentials = await sync_to_async(self._resolve)()
        except ConfigError as error:
            return FindAnswer(error=str(error))
        request = msgspec.json.encode(FindRequest(config=config, wanted=wanted))
        with credentials.files() as variables:
            return await _ask(request, _environment(variables))

    def _resolve(self) -> Any:
        registry = self.settings.get("registry")
        settings = Settings(
            **{
                **self.settings,
                "registry": registry and msgspec.convert(registry, RegistryConfig),
            }
        )
        return settings.resolve(msgspec.convert(self.base, CheckpointConfig))


def _event(payload: dict[str, Any]) -> TriggerEvent:
    return TriggerEvent(payload)  # type: ignore[no-untyped-call]


def _addresses(settings: Settings, base: CheckpointConfig) -> list[str]:
    store = split_connection(settings.store)[0] if settings.store else None
    given = settings.registry.tracking_uri if settings.registry else None
    return [url for url in (store, given, base.store.url, base.registry.tracking_uri) if url]


def _environment(variables: Mapping[str, str | None]) -> dict[str, str]:
    merged = {**os.environ, **variables}
    return {name: value for name, value in merged.items() if value is not None}


async def _ask(request: bytes, environment: Mapping[str, str]) -> FindAnswer:
    """One look, in a process that goes away with whoever waits for it."""
    process = await asyncio.create_subprocess_exec(
        *_COMMAND,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        async with asyncio.timeout(_LOOK_SECONDS):
            output, noise = await process.communicate(request)
    except TimeoutError:
        return FindAnswer(error=f"no answer after {_LOOK_SECONDS:g} s", retryable=True)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode == 0:
        return msgspec.json.decode(output, type=FindAnswer)
    said = noise.decode("utf-8", "replace")[-_SHOWN_OF_OUTPUT:].strip()
    if process.returncode is not None and process.returncode < 0:
        message = f"the process that looks was killed by signal {-process.returncode}"
        return FindAnswer(error=message, retryable=True)
    return FindAnswer(error=f"the process that looks failed: {said}")
