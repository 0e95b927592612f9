"""The gateway: checks a request, streams its batch into the payload store, writes the job, answers.
No torch."""
