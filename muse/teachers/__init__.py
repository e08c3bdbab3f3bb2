"""Frozen teachers, beside the model and never inside it: maps, text embeddings, features."""

from muse.teachers.base import FrozenTeacher, TopologyTarget
from muse.teachers.build import build_feature_teacher, build_text_teacher, build_topology_teacher
from muse.teachers.cache import CachedTeacher
from muse.teachers.prompts import class_embeddings

__all__ = [
    "CachedTeacher",
    "FrozenTeacher",
    "TopologyTarget",
    "build_feature_teacher",
    "build_text_teacher",
    "build_topology_teacher",
    "class_embeddings",
]
