"""verify(model): proof, on the user's own model, that packed documents are as independent as if alone."""

from deltatune.verification.probe import verify
from deltatune.verification.report import VerifyReport, VerifyRow

__all__ = ["VerifyReport", "VerifyRow", "verify"]
