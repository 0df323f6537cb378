// The client matrix: every client writes the same records, so any of them can check any other's.
package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/twmb/franz-go/pkg/kgo"
)

// A record of the matrix is "<writer>:<number, 8 digits>:<filling>", in partition number mod count.
func matrixValue(writer string, number int) string {
	return fmt.Sprintf("%s:%08d:%s", writer, number, strings.Repeat(string(rune('a'+number%26)), 100))
}

var codecs = []struct {
	name  string
	codec kgo.CompressionCodec
}{
	{"none", kgo.NoCompression()},
	{"gzip", kgo.GzipCompression()},
	{"snappy", kgo.SnappyCompression()},
	{"lz4", kgo.Lz4Compression()},
	{"zstd", kgo.ZstdCompression()},
}

// roundtrip fills the topics <prefix>-<codec>, which exist with 3 partitions, and reads them.
func roundtrip(ctx context.Context, args []string) error {
	c := newCommon("roundtrip")
	prefix := c.flags.String("prefix", "franz-go", "of the topics, and writer of the records")
	records := c.flags.Int("records", 3000, "per codec")
	_ = c.flags.Parse(args)
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	for _, codec := range codecs {
		topic := *prefix + "-" + codec.name
		client, err := c.client(kgo.ProducerBatchCompression(codec.codec), kgo.DefaultProduceTopic(topic))
		if err != nil {
			return err
		}
		var batch []*kgo.Record
		for n := range *records {
			batch = append(batch, &kgo.Record{Partition: int32(n % 3), Value: []byte(matrixValue(*prefix, n))})
		}
		err = client.ProduceSync(ctx, batch...).FirstErr()
		client.Close()
		if err != nil {
			return fmt.Errorf("producing to %s: %w", topic, err)
		}
		if err := readMatrix(ctx, c, topic, *prefix, *records); err != nil {
			return err
		}
		fmt.Printf("%s: %d records written and read back\n", topic, *records)
	}
	return nil
}

// read checks topics that another client filled: -topic lists them.
func read(ctx context.Context, args []string) error {
	c := newCommon("read")
	writer := c.flags.String("writer", "", "who wrote the records")
	records := c.flags.Int("records", 3000, "per topic")
	_ = c.flags.Parse(args)
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	for _, topic := range strings.Split(c.topic, ",") {
		if err := readMatrix(ctx, c, topic, *writer, *records); err != nil {
			return err
		}
		fmt.Printf("%s: %d records of %s read\n", topic, *records, *writer)
	}
	return nil
}

func readMatrix(ctx context.Context, c *common, topic, writer string, records int) error {
	client, err := c.client(
		kgo.ConsumeTopics(topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
	)
	if err != nil {
		return err
	}
	defer client.Close()
	ends, err := endOffsets(ctx, client, topic)
	if err != nil {
		return err
	}
	partitions, total := len(ends), int64(0)
	for _, end := range ends {
		total += end
	}
	if total != int64(records) {
		return fmt.Errorf("%s holds %d records, expected %d", topic, total, records)
	}
	next := make([]int, partitions)
	for p := range next {
		next[p] = p
	}
	for found := 0; found < records; {
		fetches := client.PollFetches(ctx)
		for _, e := range fetches.Errors() {
			return fmt.Errorf("reading %s-%d after %d records: %w", e.Topic, e.Partition, found, e.Err)
		}
		var wrong error
		fetches.EachRecord(func(r *kgo.Record) {
			expected := matrixValue(writer, next[r.Partition])
			if wrong == nil && string(r.Value) != expected {
				wrong = fmt.Errorf("%s-%d offset %d: %.60q instead of %.60q", topic, r.Partition, r.Offset, r.Value, expected)
			}
			next[r.Partition] += partitions
			found++
		})
		if wrong != nil {
			return wrong
		}
	}
	return nil
}
