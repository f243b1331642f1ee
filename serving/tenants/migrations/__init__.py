"""The history of the database's schema, run by ``serving.tenants.schema``. It only goes forward."""
