// Constants of the chunk loop, each with its reason.
#pragma once

namespace flashdelta::cuda::forward {

constexpr int kThreads = 512;  // an auxiliary warpgroup, two consumers, and one of two producer and two factor warps

// Stages: chunks of q, k and the record in flight, with the P and factors made from them. Three hide a load's latency behind two chunks;
// v has one more, because o leaves through the tile that v came in.
constexpr int kStages = 3;
constexpr int kValueStages = 4;

// Registers per thread: 208 * 256 + 64 * 128 + 32 * 128 = 65,536. Consumers below 208 make ptxas serialise the products (C7512).
constexpr int kConsumerRegisters = 208;
constexpr int kAuxiliaryRegisters = 64;
constexpr int kProducerRegisters = 32;

// Named barriers (0 is __syncthreads).
constexpr int kConsumerBarrier = 1;  // and 2: inside a consumer
constexpr int kTurnBarrier = 3;      // and 4: whose turn it is to issue products
constexpr int kScanBarrier = 5;      // both consumers

// Instructions, of 16 bytes, that no one runs. They stand between the consumers' code and P's: nearer to one another the two contend for
// lines of the instruction cache, which took 1 to 2 us of calls of 60 us. To be measured again when code grows or shrinks by a kilobyte;
// less than 128 is not enough, up to 512 are as good.
constexpr int kFiller = 256;

// Chunks before an item's last at which the next item is claimed. Its loads begin three chunks before its first product.
constexpr int kClaimAhead = 4;
// Chunks of key heads from which on cut calls leave queries in L2 as others do: calls of 1024 and more take up to 5 % less, of 256 2 %
// more.
constexpr int kKeepQueriesFrom = 1024;
// Of a hard chunk's tokens, those with beta - 1 above this have their key's length corrected: what others get wrong is soon forgotten.
constexpr float kLeastReflection = 0.8F;
// Decay of a hard chunk's state, as a power of 2, that may be left for later.
constexpr float kMostPostponed = 8.F;
// The sequence of an item that only rehearses.
constexpr int kNoSequence = -1;
// Items in flight: one with the producer, and those that short ones leave open behind it.
constexpr int kWorkRing = 4;

}  // namespace flashdelta::cuda::forward
