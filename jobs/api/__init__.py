"""Files, batches and jobs of the API's tenants, run by the job runner beside what people ask for."""
