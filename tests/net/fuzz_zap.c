/*
 * Requests to the ZAP handler: frames of any number and length end in an answer, and what is let
 * through is as RFC 27 says. The input is frames, each after its length in two bytes
 * (little-endian).
 */
#include <string.h>

#include "shared/net/net_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint8_t nothing[1];
    net_zap_question q = {0};
    net_zap_request request;
    size_t frames = 0;
    bool longest = false;
    const uint8_t *domain = nothing, *key = nothing;
    size_t domain_n = 0;
    for (size_t at = 0; at + 2 <= size; frames++) {
        size_t n = SH_MIN((size_t)(data[at] | data[at + 1] << 8), size - at - 2);
        const uint8_t *bytes = data + at + 2;
        net_zap_add(&q, bytes, n);
        longest = longest || n > NET_ZAP_FRAME_MAX;
        if (frames == 2) {
            domain = bytes;
            domain_n = n;
        } else if (frames == 6) {
            key = bytes;
        }
        at += 2 + n;
    }
    bool good = net_zap_read(&q, &request);
    if (!good)
        return 0;
    SH_ASSERT(frames == NET_ZAP_FRAMES && !longest);
    SH_ASSERT(strlen(request.domain) == domain_n && domain_n > 0 &&
              memcmp(request.domain, domain, domain_n) == 0);
    SH_ASSERT(!request.curve || memcmp(request.key.b, key, sizeof request.key.b) == 0);
    return 0;
}
