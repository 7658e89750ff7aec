/* What the tests of messages and of payloads compare with. */
#ifndef TESTS_WIRE_EQUAL_H
#define TESTS_WIRE_EQUAL_H

#include "shared/wire/wire.h"

/* The message's bytes; fails the test when it cannot be encoded. */
sh_buf encoded(const sh_msg *msg);
void assert_bytes(sh_bytes got, sh_bytes want);
void assert_blob(const sh_blob *a, const sh_blob *b);

#endif
