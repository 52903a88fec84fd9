"""The page of a report: values for its tables, drawings and pictures, and one template that turns them into a single file."""
