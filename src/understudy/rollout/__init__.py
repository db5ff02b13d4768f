"""Moving traffic: replay, shadow, canary, promoted or rolled back."""
