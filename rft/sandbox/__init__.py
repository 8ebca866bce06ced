"""Run untrusted programs. A leaf: it imports nothing of rft, and its processes run without it."""

from .client import (
    PROTECTIONS,
    Backend,
    Limits,
    Result,
    Sandbox,
    SandboxError,
    Session,
    TestResult,
    TestsError,
)

__all__ = [
    "PROTECTIONS",
    "Backend",
    "Limits",
    "Result",
    "Sandbox",
    "SandboxError",
    "Session",
    "TestResult",
    "TestsError",
]
