"""Weight publication: version numbers, bucket plan, digests, and the stage → verify → flip states."""
