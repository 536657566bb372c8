"""The one exception that means: the user can mend this."""


class UserError(Exception):
  """A mistake of the user's.

  The message is one line that says what is wrong and what to do. Commands
  print it as `error: <message>` on stderr and exit with status 2, without a
  traceback.
  """
