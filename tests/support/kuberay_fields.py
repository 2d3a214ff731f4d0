"""The fields of KubeRay's resources that our manifests use: types, allowed values, what is required.

``python -m tests.support.kuberay_fields VERSION CRD.yaml CRD.yaml`` writes the table again from the CRDs of a
release (``ray-operator/config/crd/bases/ray.io_rayclusters.yaml`` and ``ray.io_rayjobs.yaml`` of its tag).
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests.kuberay import Kubernetes, ray_cluster, ray_job
from cluster.shapes import ClusterShape, WorkerGroup

TABLE = Path(__file__).parents[1] / "golden" / "kuberay_fields.json"
_KEPT = ("type", "enum", "minimum", "maximum")
_TYPES = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list, "number": (int, float)}


def manifests() -> list[dict[str, Any]]:
    """Manifests that between them have every field that ours can have."""
    spot = WorkerGroup("spot", 1, 8, 64, gpus=8, gpu_kind="H100", min_count=0, max_count=4, is_spot=True)
    shape = ClusterShape(
        "dlm", "s3://bucket/store", (WorkerGroup("steady", 1, 4, 16), spot), image="registry.example.org/dlm:1"
    )
    full = Kubernetes("ml", "gke", "ray-token", "credentials", service_account="dlm")
    on_disk = ClusterShape("dlm", "/shared/store", shape.workers[:1], image=shape.image)
    claim = Kubernetes(store_claim="store")
    both = ((shape, full), (on_disk, claim))
    return [made for pair in both for made in (ray_cluster(*pair), ray_job(*pair, "run-1"))]


def walk(value: Any, path: str, fields: dict[str, Any] | None = None) -> Iterator[tuple[str, Any]]:
    """Every value of a manifest with its path: ``[]`` for items, ``{}`` for keys that ``fields`` knows to be free."""
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            free = fields is not None and f"{path}.{{}}" in fields
            yield from walk(item, f"{path}.{{}}" if free else f"{path}.{key}", fields)
    elif isinstance(value, list):
        for item in value:
            yield from walk(item, f"{path}[]", fields)


def problems(manifest: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """What of a manifest the resource does not allow; a field that the table lacks is one."""
    fields = table["kinds"][manifest["kind"]]
    found = []
    for path, value in walk(manifest["spec"], "spec", fields):
        field = fields.get(path)
        if field is None:
            found.append(f"{path}: unknown")
            continue
        types = field["type"] if isinstance(field["type"], list) else [field["type"]]
        if not any(isinstance(value, _TYPES[name]) and (name == "boolean") == (type(value) is bool) for name in types):
            found.append(f"{path}: {value!r} is no {' or '.join(types)}")
        elif "enum" in field and value not in field["enum"]:
            found.append(f"{path}: {value!r} is none of {field['enum']}")
        elif isinstance(value, int) and not field.get("minimum", value) <= value <= field.get("maximum", value):
            found.append(f"{path}: {value!r} is out of range")
        if isinstance(value, dict):
            found += [f"{path}: lacks {name}" for name in field.get("required", []) if name not in value]
    return found


def _schema(crd: dict[str, Any]) -> dict[str, Any]:
    (v1,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    return v1["schema"]["openAPIV3Schema"]["properties"]["spec"]


def _child(schema: dict[str, Any], key: str) -> tuple[str, dict[str, Any]] | None:
    if key in schema.get("properties", {}):
        return f".{key}", schema["properties"][key]
    free = schema.get("additionalProperties")
    return (".{}", free) if isinstance(free, dict) else None


def _table_of(value: Any, path: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The fields of a value, as its schema has them."""
    kept = {name: schema[name] for name in _KEPT if name in schema}
    if schema.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
    if schema.get("required"):
        kept["required"] = schema["required"]
    table = {path: kept}
    if isinstance(value, dict):
        for key, item in value.items():
            if (child := _child(schema, key)) is None:
                raise SystemExit(f"{path}.{key} is not in this CRD")
            table |= _table_of(item, f"{path}{child[0]}", child[1])
    elif isinstance(value, list):
        for item in value:
            table |= _table_of(item, f"{path}[]", schema["items"])
    return table


def main() -> None:
    """Write the table from the CRD files on the command line."""
    version, *files = sys.argv[1:]
    crds = [yaml.load(Path(name).read_text(encoding="utf-8"), yaml.CSafeLoader) for name in files]
    schemas = {crd["spec"]["names"]["kind"]: _schema(crd) for crd in crds}
    kinds: dict[str, dict[str, Any]] = {kind: {} for kind in schemas}
    for manifest in manifests():
        kinds[manifest["kind"]] |= _table_of(manifest["spec"], "spec", schemas[manifest["kind"]])
    text = ",\n".join(
        f"{json.dumps(kind)}: {{\n"
        + ",\n".join(f"{json.dumps(path)}: {json.dumps(field)}" for path, field in sorted(fields.items()))
        + "\n}"
        for kind, fields in kinds.items()
    )
    TABLE.write_text(f'{{"kuberay": {json.dumps(version)}, "kinds": {{\n{text}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
