"""Configuration: one frozen, typed model per component, composed in `CheckpointConfig`.

The same names serve TOML files, the environment (``CKPT_TASKS_<SECTION>_<KEY>``), keyword
arguments and, for the common ones, command-line flags. Values are checked wherever they come
from, also by the constructors.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import quote

import msgspec

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.masking import (
    MASK,
    add_secret_names,
    is_secret_name,
    mask_hyperparameters,
    mask_text,
    mask_url,
)
from ckpt_tasks.sizes import parse_size
from ckpt_tasks.spelling import parse_best, parse_bucket, parse_duration
from ckpt_tasks.suggest import did_you_mean

__all__ = [
    "AttemptConfig",
    "CheckpointConfig",
    "RegistryConfig",
    "RetentionConfig",
    "SaveConfig",
    "ScheduleConfig",
    "Seconds",
    "SecretsConfig",
    "StoreConfig",
    "load_config",
    "parse_duration",
]

Seconds = Annotated[float, msgspec.Meta(gt=0)]
"""A duration; TOML, environment and flags also take ``"90s"``, ``"10m"``, ``"1h30m"``."""

_Delay = Annotated[float, msgspec.Meta(ge=0)]  # seconds, where none is a choice too
_AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
_Bytes = Annotated[int, msgspec.Meta(ge=1, title="bytes")]  # text is read as a size
_Name = Annotated[str, msgspec.Meta(min_length=1)]

_ENVIRONMENT_PREFIX = "CKPT_TASKS_"
_FILE_VARIABLE = "CKPT_TASKS_CONFIG"

_BEST = re.compile(r"(?P<metric>.+):(?P<mode>min|max)")
_BEATS_BEFORE_TAKEOVER = 3


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    def __post_init__(self) -> None:
        # Decoding checks types and ranges, but a call of the constructor does not.
        for field in msgspec.structs.fields(type(self)):
            value = getattr(self, field.name)
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError as error:
                name = f"{type(self).__name__.removesuffix('Config').lower()}.{field.name}"
                raise ConfigError(f"{name} = {_shown(name, value)}: {error}") from error

    def __repr__(self) -> str:
        """As the call that makes it. Orchestrators log and keep it, so without credentials."""
        values = {field.name: getattr(self, field.name) for field in msgspec.structs.fields(self)}
        shown = (f"{name}={mask_text(repr(value))}" for name, value in values.items())
        return f"{type(self).__name__}({', '.join(shown)})"


class StoreConfig(_Section, frozen=True, kw_only=True):
    """Where checkpoints are stored."""

    url: _Name = "checkpoints"
    """Root: a path, or a URL that fsspec opens (``s3://bucket/prefix``)."""
    single_writer: bool = False
    """Declare that no two attempts can ever write at once. Needed for a store without a
    conditional create, where the fence cannot hold otherwise."""
    options: dict[str, str | int | float | bool] = {}
    """Options for the file system, as fsspec names them (``endpoint_url``). Never credentials:
    those come from the environment or the cloud's own configuration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.options:
            if name == "key" or is_secret_name(name):
                raise ConfigError(
                    f"store.options.{name} is a credential, and configuration is written to "
                    "records that others can read; set it in the environment "
                    "(AWS_SECRET_ACCESS_KEY, ...) or in the cloud's own configuration"
                )


class ScheduleConfig(_Section, frozen=True, kw_only=True):
    """When a save is due; any of them."""

    every_steps: _AtLeastOne | None = None
    every_epochs: _AtLeastOne | None = None
    every: Seconds | None = None
    """Seconds since the last save."""
    final: bool = True
    """Save when training ends."""


class SaveConfig(_Section, frozen=True, kw_only=True):
    """How a save is made."""

    asynchronous: bool = True
    """Training waits only until the state is copied, and another process writes it. Else training
    waits for the commit."""
    overlap: bool = False
    """What only the steps of tracked optimizers change is copied during the next forward and
    backward pass, and the step waits for it. Nothing else may change parameters in place there."""
    incremental: bool = True
    """Tensors that have not changed since the last checkpoint, such as frozen weights, are referred
    to and not written again."""
    row_blocks: list[_Name] = []
    """Tensors that are saved in blocks of rows, each of about 1 MiB, as ``model.embedding.weight``
    or ``optimizer.state.*``: where few rows change, only their blocks are written again. In the
    files each block is a tensor of its own. For `incremental` saves."""
    on_error: Literal["continue", "stop"] = "continue"
    """When a save fails: training goes on, until it has been without a new checkpoint for
    ``attempt.max_unprotected``; or the attempt fails at once, worth retrying. The saves of a signal
    and of the end are tried again either way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_blocks and not self.incremental:
            raise ConfigError(
                f"save.row_blocks = {self.row_blocks!r} without save.incremental: every block "
                "would be written at every save; leave one of the two settings out"
            )


class RetentionConfig(_Section, frozen=True, kw_only=True):
    """Which checkpoints are kept: those that any of the first five names, as far as the two limits
    allow. Without any of them, all are.

    The newest checkpoint that a retry would start from, pinned ones, and those that the registry
    holds by an alias are kept whatever is written here.
    """

    latest: _AtLeastOne | None = None
    """The newest so many that a retry could start from."""
    best: list[str] = []
    """``N:METRIC:min`` or ``N:METRIC:max``: the N with the best values of a metric. One, where N
    is left out."""
    every_steps: _AtLeastOne | None = None
    """The first at or after each multiple of so many steps."""
    every_epochs: _AtLeastOne | None = None
    """The first at or after each multiple of so many completed epochs."""
    buckets: list[str] = []
    """``EVERY:FOR``, as in ``["all:1h", "1h:1d", "1d:30d"]``: all of the last hour, then the newest
    of each hour for a day, and of each day for thirty days."""
    max_age: Seconds | None = None
    """Older ones go, whatever of the above names them."""
    max_bytes: _Bytes | None = None
    """Of one run, with what they share counted once: while those kept take more, the oldest goes.
    TOML, environment and flags also take ``"500GB"``, ``"1.5TiB"``."""
    grace: Seconds = 3600.0
    """Seconds, by the store's clock, for which the bytes of an expired checkpoint, and what killed
    writes have left, stay. Must exceed the longest save and the longest restore."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.best:
            parse_best(text)
        for text in self.buckets:
            parse_bucket(text)

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing is configured that would let any checkpoint go."""
        rules = (self.latest, self.best, self.every_steps, self.every_epochs, self.buckets)
        return not any((*rules, self.max_age, self.max_bytes))


class RegistryConfig(_Section, frozen=True, kw_only=True):
    """Where checkpoints are registered; without a `tracking_uri`, nowhere."""

    kind: _Name = "mlflow"
    """Name of the entry point in the group ``ckpt_tasks.registries``."""
    tracking_uri: _Name | None = None
    experiment: _Name = "ckpt_tasks"
    registered_model: _Name | None = None
    """Default: the experiment's name."""
    best: str | None = None
    """``METRIC:min`` or ``METRIC:max``: the alias ``best`` follows it."""
    metrics: Literal["live", "committed"] = "live"
    """When metrics are sent: as they are logged, or once a checkpoint holds their step. Steps that
    an attempt does again keep their first value in a registry that was told live; of a training
    that is not deterministic, ``committed`` shows what the checkpoints come from."""
    hyperparameter_tags: list[str] | None = None
    """Hyperparameters shown as tags of each version. Default: the first few."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best is not None and not _BEST.fullmatch(self.best):
            raise ConfigError(
                f"registry.best = {self.best!r} does not say which way is better; write "
                "METRIC:min or METRIC:max, for example 'val_loss:min'"
            )


class AttemptConfig(_Section, frozen=True, kw_only=True):
    """What an attempt trains on, and how attempts follow one another and end."""

    nproc: _AtLeastOne = 1
    """Ranks that train, each in a process of its own, all on the machine of the attempt."""
    heartbeat: Seconds = 5.0
    """Seconds between two heartbeats."""
    takeover_after: Seconds = 60.0
    """Seconds without a heartbeat, by the observer's own clock, after which another
    invocation takes over."""
    without_commit: _AtLeastOne = 5
    """Attempts of one invocation in a row that may end without a new commit."""
    grace: _Delay = 30.0
    """Seconds that the trainer has to save and stop after a signal; until then the save that the
    signal asks for is tried again where it fails."""
    max_unprotected: Seconds = 1800.0
    """Seconds without a durable checkpoint, while saves fail, after which the attempt fails; until
    then the final save is tried again, and the attempt waits for it."""
    drain: _Delay = 60.0
    """Seconds that the registrar has to empty its queue after the trainer has ended."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.takeover_after < _BEATS_BEFORE_TAKEOVER * self.heartbeat:
            raise ConfigError(
                f"attempt.takeover_after = {self.takeover_after:g} s is less than "
                f"{_BEATS_BEFORE_TAKEOVER} x attempt.heartbeat = {self.heartbeat:g} s: one late "
                "heartbeat would cost a live attempt its run"
            )


class DashboardConfig(_Section, frozen=True, kw_only=True):
    """Where people look at a run, besides the registry's own pages."""

    url: _Name | None = None
    """Address of a run's page; ``{run}`` in it stands for the run's name. Orchestrators link to
    it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"dashboard.url = {self.url!r} is no address of a page; write "
                "https://HOST/PATH, with {run} where the run's name belongs"
            )

    def page(self, run: str) -> str | None:
        """Address of the page of `run`, where there is one."""
        return self.url and self.url.replace("{run}", quote(run, safe=""))


class SecretsConfig(_Section, frozen=True, kw_only=True):
    """What is a credential, beyond what its name tells."""

    names: list[_Name] = []
    """Hyperparameters, as ``license`` or ``*_dsn``, and parameters of URLs whose values are masked
    wherever they would be written or shown. They add to the usual names (``password``, ``api_key``,
    ...), for all that this process and those of its attempts do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Wherever a configuration comes from, and before anything that it speaks of is shown.
        add_secret_names(self.names)


class CheckpointConfig(_Section, frozen=True, kw_only=True):
    """All of it."""

    store: StoreConfig = StoreConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    save: SaveConfig = SaveConfig()
    retention: RetentionConfig = RetentionConfig()
    registry: RegistryConfig = RegistryConfig()
    attempt: AttemptConfig = AttemptConfig()
    dashboard: DashboardConfig = DashboardConfig()
    secrets: SecretsConfig = SecretsConfig()


_SECTIONS: dict[str, type[_Section]] = {
    "store": StoreConfig,
    "schedule": ScheduleConfig,
    "save": SaveConfig,
    "retention": RetentionConfig,
    "registry": RegistryConfig,
    "attempt": AttemptConfig,
    "dashboard": DashboardConfig,
    "secrets": SecretsConfig,
}


class _Setting(msgspec.Struct, frozen=True):
    """One value as it was found, and where."""

    section: str
    key: str
    value: Any
    origin: str

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"


def load_config(
    file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> CheckpointConfig:
    """Put the configuration together: `overrides` win over `environ`, that over `file`.

    Parameters
    ----------
    file
        A TOML file with the tables ``[store]``, ``[schedule]``, ``[retention]``, ....
        Default: what ``CKPT_TASKS_CONFIG`` names, if it is set.
    environ
        Variables ``CKPT_TASKS_<SECTION>_<KEY>``; default: the process's own. Lists and
        mappings are written as JSON.
    overrides
        ``{"schedule.every_steps": 500}``; values may be text, as from a command line.

    Raises
    ------
    ConfigError
        The file cannot be read, or a key or value is wrong: the message names it, where it
        came from, and the nearest valid one.
    """
    variables = os.environ if environ is None else environ
    file = file if file is not None else variables.get(_FILE_VARIABLE) or None
    found: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    origins: dict[str, str] = {}
    for settings in (
        _from_file(Path(file)) if file is not None else (),
        _from_environment(variables),
        _from_overrides(overrides or {}),
    ):
        for setting in settings:
            found[setting.section][setting.key] = _convert(setting)
            origins[setting.name] = setting.origin
    return CheckpointConfig(**{name: _build(name, found[name], origins) for name in _SECTIONS})


def _from_file(path: Path) -> Iterator[_Setting]:
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} is not valid TOML: {error}") from error
    for section, table in document.items():
        _check_section(section, f"{path}: [{section}]")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} is a value; write a table, [{section}]")
        for key, value in table.items():
            yield _setting(section, key, value, f"{path}: {section}.{key}")


def _from_environment(environ: Mapping[str, str]) -> Iterator[_Setting]:
    known = {
        f"{_ENVIRONMENT_PREFIX}{section}_{key}".upper(): (section, key)
        for section in _SECTIONS
        for key in _keys(section)
    }
    prefixes = tuple(f"{_ENVIRONMENT_PREFIX}{section}_".upper() for section in _SECTIONS)
    for variable in sorted(environ):
        if variable in known:
            yield _setting(*known[variable], environ[variable], f"environment: {variable}")
        elif variable.startswith(prefixes):
            hint = did_you_mean(variable, known, what="variables")
            raise ConfigError(f"unknown environment variable {variable}; {hint}")


def _from_overrides(overrides: Mapping[str, Any]) -> Iterator[_Setting]:
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        origin = f"argument {name}"
        _check_section(section, origin)
        yield _setting(section, key, value, origin)


def _check_section(section: str, origin: str) -> None:
    if section not in _SECTIONS:
        hint = did_you_mean(section, _SECTIONS, what="sections")
        raise ConfigError(f"unknown section {section!r} ({origin}); {hint}")


def _setting(section: str, key: str, value: Any, origin: str) -> _Setting:
    if key not in _keys(section):
        hint = did_you_mean(key, _keys(section), what=f"keys of [{section}]")
        raise ConfigError(f"unknown key {key!r} in [{section}] ({origin}); {hint}")
    return _Setting(section, key, value, origin)


def _keys(section: str) -> tuple[str, ...]:
    return _SECTIONS[section].__struct_fields__


def _convert(setting: _Setting) -> Any:
    """The value as its field's type wants it; text is read as the type asks."""
    fields = msgspec.structs.fields(_SECTIONS[setting.section])
    kind = next(field.type for field in fields if field.name == setting.key)
    value = setting.value
    try:
        if isinstance(value, str):
            value = _read_text(value, kind)
        return msgspec.convert(value, kind, strict=not isinstance(setting.value, str))
    except (msgspec.MsgspecError, ValueError) as error:
        shown = _shown(setting.name, setting.value)
        raise ConfigError(f"{setting.name} = {shown} ({setting.origin}): {error}") from error


def _read_text(text: str, kind: Any) -> Any:
    alternatives = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if Seconds in alternatives or _Delay in alternatives:
        return parse_duration(text)
    if _Bytes in alternatives:
        return parse_size(text)
    if any(get_origin(alternative) in (dict, list) for alternative in alternatives):
        return msgspec.json.decode(text)
    if get_origin(kind) is Literal and text not in get_args(kind):
        raise ValueError(did_you_mean(text, get_args(kind), what="valid values"))
    return text


def _build(name: str, values: dict[str, Any], origins: Mapping[str, str]) -> Any:
    try:
        return _SECTIONS[name](**values)
    except ConfigError as error:
        involved = [origins[f"{name}.{key}"] for key in values if f"{name}.{key}" in str(error)]
        if not involved:
            raise
        raise ConfigError(f"{error} ({'; '.join(involved)})") from error


def _shown(name: str, value: Any) -> str:
    """A value as messages show it: no credential, not too long."""
    if is_secret_name(name):
        return MASK
    if name == "store.options":  # may hold credentials, in text that cannot even be read
        value = mask_hyperparameters(value) if isinstance(value, Mapping) else MASK
    text = repr(mask_url(value) if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:80]}..."
