"""From records to numbers: frames, paired differences, claims and verdicts."""
