"""Reads the settings, once, from a YAML file.

Unknown keys and wrong types are errors that say where, what was expected and what was found.
"""

from pathlib import Path

import yaml
from pydantic import ValidationError

from tidemill.core.settings import (
    LatencySettings,
    ModelSettings,
    NetworkSettings,
    NodeTlsSettings,
    Settings,
    SettingsError,
)


def load_settings(path: Path) -> Settings:
    """Read a YAML file. Raises SettingsError on a missing file, bad YAML, unknown keys and wrong types."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: expected a mapping of sections at the top, found {type(tree).__name__}")
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(f"{path}:\n" + "\n".join(_faults(error))) from error
    return _with_absolute_paths(settings, path.parent.resolve())


def _faults(error: ValidationError) -> list[str]:
    """One line for each fault: place, what was wrong, what was found."""
    lines = []
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"]) or "settings"
        if fault["type"] == "extra_forbidden":
            lines.append(f"  {place}: unknown key; see docs/settings.md for the keys there are")
        elif fault["type"] == "value_error":
            lines.append(f"  {place}: {fault['ctx']['error']}")
        else:
            lines.append(f"  {place}: {fault['msg']} (found {fault['input']!r})")
    return lines


def _with_absolute_paths(settings: Settings, base: Path) -> Settings:
    """Relative paths count from the settings file, so that a worker on the same machine finds them from anywhere."""

    def rooted(model: ModelSettings | None) -> ModelSettings | None:
        return model and model.model_copy(update={"path": (base / model.path).resolve()})

    def rooted_latency(latency: LatencySettings) -> LatencySettings:
        return latency.model_copy(update={"measured": latency.measured and base / latency.measured})

    router = settings.router
    tls = router.tls and router.tls.model_copy(
        update={
            "certificate": base / router.tls.certificate,
            "key": base / router.tls.key,
            "client_ca": router.tls.client_ca and base / router.tls.client_ca,
        }
    )
    token_file = router.token_file and base / router.token_file
    nodes = settings.network.tls
    nodes = nodes and NodeTlsSettings(certificate=base / nodes.certificate, key=base / nodes.key, ca=base / nodes.ca)
    ca = settings.traces.ca and base / settings.traces.ca
    targets_file = settings.metrics.targets_file and base / settings.metrics.targets_file
    return settings.model_copy(
        update={
            "target": rooted(settings.target),
            "draft": rooted(settings.draft),
            "emulated": settings.emulated.model_copy(
                update={each: rooted_latency(getattr(settings.emulated, each)) for each in ("target", "draft")}
            ),
            "router": router.model_copy(update={"tls": tls, "token_file": token_file}),
            "network": NetworkSettings(tls=nodes),
            "traces": settings.traces.model_copy(update={"ca": ca}),
            "metrics": settings.metrics.model_copy(update={"targets_file": targets_file}),
        }
    )
