"""Any torch module as a subject, through forward hooks."""
