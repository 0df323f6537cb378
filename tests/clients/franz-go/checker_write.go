// The producers of the consistency checker.
package main

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	// Sends without outcome per producer and partition.
	inFlightPerPartition = 20
	// A client that is replaced lives this long at least, and at most twice as long.
	clientLife = 8 * time.Second
)

// producer is one client that writes. Its sequence numbers start anew with it.
type producer struct {
	id   int
	mode string

	mu       sync.Mutex
	next     []int
	inFlight []int
	// Sends of this number or above count as sent after healing.
	since []int
	acked []bool
}

func (c *checker) newProducer(mode string) *producer {
	p := &producer{
		id: int(c.nextClient.Add(1)), mode: mode,
		next: make([]int, len(c.partitions)), inFlight: make([]int, len(c.partitions)),
		since: make([]int, len(c.partitions)), acked: make([]bool, len(c.partitions)),
	}
	c.history.note("client", `"c":%d,"mode":%s`, p.id, quoted(mode))
	c.mu.Lock()
	c.producers[p] = true
	c.mu.Unlock()
	return p
}

func (c *checker) removeProducer(p *producer) {
	c.mu.Lock()
	delete(c.producers, p)
	c.mu.Unlock()
}

func (p *producer) forgetAcks() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for n := range p.acked {
		p.since[n], p.acked[n] = p.next[n], false
	}
}

func (p *producer) withoutAck() (left []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for n, acked := range p.acked {
		if !acked {
			left = append(left, fmt.Sprintf("client %d (%s) has no ack in partition %d; in flight %d", p.id, p.mode, n, p.inFlight[n]))
		}
	}
	return left
}

// take notes a send and gives its sequence number; false if the partition has enough in flight.
func (c *checker) take(p *producer, partition int) (int, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.inFlight[partition] >= inFlightPerPartition {
		return 0, false
	}
	sequence := p.next[partition]
	p.next[partition]++
	p.inFlight[partition]++
	c.sent.Add(1)
	c.history.note("send", `"c":%d,"p":%d,"s":%d`, p.id, partition, sequence)
	return sequence, true
}

func (c *checker) ok(p *producer, partition, sequence int, offset int64) {
	c.history.note("ok", `"c":%d,"p":%d,"s":%d,"o":%d`, p.id, partition, sequence, offset)
	c.acked.Add(1)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.inFlight[partition]--
	if sequence >= p.since[partition] {
		p.acked[partition] = true
	}
}

// notOk notes a send that failed: "fail" if it was certainly not done, else "unknown".
func (c *checker) notOk(p *producer, partition, sequence int, certain bool, err error) {
	kind, count := "unknown", &c.unknown
	if certain {
		kind, count = "fail", &c.failed
	}
	c.history.note(kind, `"c":%d,"p":%d,"s":%d,"why":%s`, p.id, partition, sequence, quoted(err.Error()))
	count.Add(1)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.inFlight[partition]--
}

// Mostly small, now and then larger than what a broker keeps together.
func valueSize(random *rand.Rand) int {
	if random.Intn(12) == 0 {
		return 2_000 + random.Intn(20_000)
	}
	return 10 + random.Intn(200)
}

// produceAs writes with clients that retry without limit, one after the other.
func (c *checker) produceAs(mode string, churn bool, random *rand.Rand) {
	for c.writing.Err() == nil {
		opts := []kgo.Opt{
			kgo.ProducerBatchCompression(kgo.NoCompression()),
			kgo.ProduceRequestTimeout(3 * time.Second),
			kgo.UnknownTopicRetries(-1),
			kgo.ProducerLinger(0),
			// A sequence that the broker refuses is told, not smoothed over.
			kgo.StopProducerOnDataLossDetected(),
		}
		if mode == "retry" {
			opts = append(opts, kgo.DisableIdempotentWrite(), kgo.MaxProduceRequestsInflightPerBroker(1+random.Intn(4)))
		}
		client, err := c.client(opts...)
		if err != nil {
			c.stuck("producer", "no client: %v", err)
			return
		}
		life, done := c.writing, context.CancelFunc(func() {})
		if churn {
			life, done = context.WithTimeout(c.writing, clientLife+time.Duration(random.Int63n(int64(clientLife))))
		}
		p := c.newProducer(mode)
		c.sendUntil(life, client, p, random)
		done()
		if c.writing.Err() != nil {
			c.flush(client, p)
		}
		c.removeProducer(p)
		// What is in flight of a client that is replaced ends as unknown.
		client.Close()
	}
}

// flush waits for the outcomes of what is in flight.
func (c *checker) flush(client *kgo.Client, p *producer) {
	ctx, cancel := context.WithTimeout(c.reading, c.bound)
	defer cancel()
	if err := client.Flush(ctx); err != nil {
		c.stuck("producer", "client %d (%s) has sends without outcome after %v: %v", p.id, p.mode, c.bound, err)
	}
}

func (c *checker) sendUntil(ctx context.Context, client *kgo.Client, p *producer, random *rand.Rand) {
	interval := time.Second / time.Duration(c.rate)
	for ctx.Err() == nil {
		burst := 1
		if random.Intn(20) == 0 {
			burst = 1 + random.Intn(30)
		}
		partition := random.Intn(len(c.partitions))
		for range burst {
			sequence, ok := c.take(p, partition)
			if !ok {
				break
			}
			name := c.partitions[partition]
			record := &kgo.Record{
				Topic: name.topic, Partition: name.partition,
				Value: checkerValue(p.id, partition, sequence, valueSize(random)),
			}
			// Without a context of its own: only an outcome or the client's end ends it.
			client.Produce(context.Background(), record, func(r *kgo.Record, err error) {
				if err != nil {
					// An earlier try may have been done.
					c.notOk(p, partition, sequence, false, err)
				} else {
					c.ok(p, partition, sequence, r.Offset)
				}
			})
		}
		pause(ctx, time.Duration(burst)*interval)
	}
}

// produceOnce writes by produce requests of its own making, each sent once whatever comes back.
func (c *checker) produceOnce(random *rand.Rand) {
	client, err := c.client(kgo.RequiredAcks(kgo.AllISRAcks()), kgo.DisableIdempotentWrite(), kgo.MaxProduceRequestsInflightPerBroker(1))
	if err != nil {
		c.stuck("producer", "no client: %v", err)
		return
	}
	defer client.Close()
	p := c.newProducer("once")
	defer c.removeProducer(p)
	interval := time.Second / time.Duration(c.rate)
	for c.writing.Err() == nil {
		routes, err := c.routes(c.writing, client)
		if err != nil {
			pause(c.writing, 50*time.Millisecond)
			continue
		}
		// The leaders as they were: some of these requests go to those that are not any more.
		for range 20 {
			partition := random.Intn(len(c.partitions))
			c.sendOnce(client, p, routes[partition], partition, 1+random.Intn(3), random)
			pause(c.writing, interval)
			if c.writing.Err() != nil {
				return
			}
		}
	}
}

// route is what metadata says about a partition.
type route struct {
	topicID     [16]byte
	leader      int32
	leaderEpoch int32
}

func (c *checker) routes(ctx context.Context, client *kgo.Client) ([]route, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request := kmsg.NewPtrMetadataRequest()
	for _, topic := range c.topics() {
		requested := kmsg.NewMetadataRequestTopic()
		requested.Topic = kmsg.StringPtr(topic)
		request.Topics = append(request.Topics, requested)
	}
	response, err := request.RequestWith(ctx, client)
	if err != nil {
		return nil, err
	}
	routes := make([]route, len(c.partitions))
	found := 0
	for _, topic := range response.Topics {
		for _, partition := range topic.Partitions {
			if topic.Topic == nil || partition.Leader < 0 {
				continue
			}
			routes[c.number(*topic.Topic, partition.Partition)] = route{topic.TopicID, partition.Leader, partition.LeaderEpoch}
			found++
		}
	}
	if found != len(routes) {
		return nil, fmt.Errorf("%d of %d partitions have a leader", found, len(routes))
	}
	return routes, nil
}

func (c *checker) sendOnce(client *kgo.Client, p *producer, to route, partition, count int, random *rand.Rand) {
	var values [][]byte
	var sequences []int
	for range count {
		sequence, ok := c.take(p, partition)
		if !ok {
			break
		}
		sequences = append(sequences, sequence)
		values = append(values, checkerValue(p.id, partition, sequence, valueSize(random)))
	}
	if len(values) == 0 {
		return
	}
	base, certain, err := c.produceRequest(client, to, c.partitions[partition], values)
	for i, sequence := range sequences {
		if err != nil {
			c.notOk(p, partition, sequence, certain, err)
		} else {
			c.ok(p, partition, sequence, base+int64(i))
		}
	}
}

// Codes by which a leader says that it did not append and will not.
var certainlyNotDone = []error{
	kerr.NotLeaderForPartition, kerr.NotEnoughReplicas, kerr.UnknownTopicOrPartition,
	kerr.LeaderNotAvailable, kerr.UnknownTopicID, kerr.FencedLeaderEpoch,
	kerr.MessageTooLarge, kerr.CorruptMessage, kerr.InvalidRecord, kerr.InvalidTimestamp,
	kerr.InvalidRequiredAcks, kerr.TopicAuthorizationFailed, kerr.PolicyViolation,
}

func (c *checker) produceRequest(client *kgo.Client, to route, name partitionName, values [][]byte) (base int64, certain bool, err error) {
	request := kmsg.NewPtrProduceRequest()
	request.Acks = -1
	request.TimeoutMillis = 3000
	topic := kmsg.NewProduceRequestTopic()
	topic.Topic, topic.TopicID = name.topic, to.topicID
	partition := kmsg.NewProduceRequestTopicPartition()
	partition.Partition, partition.Records = name.partition, recordBatch(values)
	topic.Partitions = append(topic.Partitions, partition)
	request.Topics = append(request.Topics, topic)
	// The answer comes a little after the request's own timeout at the latest.
	ctx, cancel := context.WithTimeout(c.reading, 10*time.Second)
	defer cancel()
	answer, err := client.Broker(int(to.leader)).Request(ctx, request)
	if err != nil {
		return 0, false, err
	}
	response, ok := answer.(*kmsg.ProduceResponse)
	if !ok || len(response.Topics) != 1 || len(response.Topics[0].Partitions) != 1 {
		return 0, false, errors.New("an answer about other partitions")
	}
	result := response.Topics[0].Partitions[0]
	if err := kerr.ErrorForCode(result.ErrorCode); err != nil {
		for _, known := range certainlyNotDone {
			certain = certain || errors.Is(err, known)
		}
		return 0, certain, err
	}
	return result.BaseOffset, false, nil
}

// recordBatch encodes values as one batch of a producer without an id.
func recordBatch(values [][]byte) []byte {
	now := time.Now().UnixMilli()
	batch := kmsg.RecordBatch{
		PartitionLeaderEpoch: -1, Magic: 2, LastOffsetDelta: int32(len(values) - 1),
		FirstTimestamp: now, MaxTimestamp: now,
		ProducerID: -1, ProducerEpoch: -1, FirstSequence: -1, NumRecords: int32(len(values)),
	}
	for i, value := range values {
		record := kmsg.Record{OffsetDelta: int32(i), Value: value}
		// The length counts what follows it; of an empty record it takes one byte itself.
		record.Length = int32(len(record.AppendTo(nil)) - 1)
		batch.Records = record.AppendTo(batch.Records)
	}
	encoded := batch.AppendTo(nil)
	const lengthEnd, crcEnd = 12, 21
	batch.Length = int32(len(encoded) - lengthEnd)
	batch.CRC = int32(crc32.Checksum(encoded[crcEnd:], crc32.MakeTable(crc32.Castagnoli)))
	return batch.AppendTo(nil)
}
