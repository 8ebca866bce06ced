"""Run untrusted programs. Imports nothing from rft, and its processes run without rft."""

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
