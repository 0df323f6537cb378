// The scenarios of `versions` about consumer groups.
//
// Invariant: each version has a group of its own, so none finds what another left.
package main

import (
	"fmt"
	"slices"

	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	coordinatorLoading      int16 = 14
	coordinatorNotAvailable int16 = 15
	notCoordinator          int16 = 16
	memberIDRequired        int16 = 79
	// Of the groups: what members say of themselves is not looked into.
	protocolType, protocolName = "consumer", "range"
	memberMetadata, assignment = "metadata of the member", "assignment of the member"
	memberTimeoutMS            = 60_000
)

// coordinatorOf finds the coordinator of a group in the version, as its id and address.
func (s *session) coordinatorOf(group string, version int16) (kmsg.Response, int32, string) {
	request := kmsg.NewPtrFindCoordinatorRequest()
	request.CoordinatorKey, request.CoordinatorKeys = group, []string{group}
	response := ask[*kmsg.FindCoordinatorResponse](s, request, version)
	if response.Version < 4 {
		expect(s, response, "error code", response.ErrorCode, 0)
		return response, response.NodeID, fmt.Sprintf("%s:%d", response.Host, response.Port)
	}
	expect(s, response, "number of coordinators", len(response.Coordinators), 1)
	for _, found := range response.Coordinators {
		expect(s, response, "error code", found.ErrorCode, 0)
		expect(s, response, "key", found.Key, group)
		return response, found.NodeID, fmt.Sprintf("%s:%d", found.Host, found.Port)
	}
	return response, -1, ""
}

// awaitCoordinator waits until a group has a coordinator that has read its log: the first group of all
// is there before the partitions of its topic are. What is asked for that is not counted as called.
func (s *session) awaitCoordinator(group string) {
	find, fetch := kmsg.NewPtrFindCoordinatorRequest(), kmsg.NewPtrOffsetFetchRequest()
	find.CoordinatorKey, fetch.Group = group, group
	find.SetVersion(s.fit(kmsg.FindCoordinator, 0))
	fetch.SetVersion(s.fit(kmsg.OffsetFetch, 2))
	code := coordinatorNotAvailable
	var failure error
	there := until(s.deadline, func() bool {
		found, fetched := find.ResponseKind().(*kmsg.FindCoordinatorResponse), fetch.ResponseKind().(*kmsg.OffsetFetchResponse)
		body, err := s.exchange(s.bootstrap, find)
		if err == nil && found.ReadFrom(body) == nil && found.ErrorCode == 0 {
			body, err = s.exchange(s.bootstrap, fetch)
			if err == nil && fetched.ReadFrom(body) == nil {
				code = fetched.ErrorCode
			}
		}
		failure = err
		return err != nil || (code != coordinatorLoading && code != coordinatorNotAvailable && code != notCoordinator)
	})
	if failure != nil {
		s.wrong("waiting for a coordinator of %s: %v", group, failure)
	} else if !there {
		s.wrong("%s: still no coordinator: error %d", group, code)
	}
}

func (s *session) findCoordinator(version int16) {
	group := fmt.Sprintf("find-%d", version)
	s.awaitCoordinator(group)
	response, node, address := s.coordinatorOf(group, version)
	metadata, _ := s.describedTopic(mainTopic)
	is := func(b kmsg.MetadataResponseBroker) bool {
		return b.NodeID == node && fmt.Sprintf("%s:%d", b.Host, b.Port) == address
	}
	expect(s, response, "is at a broker's address", slices.ContainsFunc(metadata.Brokers, is), true)
}

// offsets commits and fetches, for a group without members.
func (s *session) offsets(version int16) {
	group, offset, comment := fmt.Sprintf("offsets-%d", version), int64(100+version), fmt.Sprintf("by %d", version)
	s.awaitCoordinator(group)
	commit := kmsg.NewPtrOffsetCommitRequest()
	commit.Group, commit.Generation, commit.RetentionTimeMillis = group, -1, -1
	topic := kmsg.NewOffsetCommitRequestTopic()
	topic.Topic, topic.TopicID = mainTopic, s.topicID
	partition := kmsg.NewOffsetCommitRequestTopicPartition()
	partition.Partition, partition.Offset, partition.Metadata = 1, offset, &comment
	topic.Partitions = append(topic.Partitions, partition)
	commit.Topics = append(commit.Topics, topic)
	committed := ask[*kmsg.OffsetCommitResponse](s, commit, version)
	expect(s, committed, "number of topics", len(committed.Topics), 1)
	for _, topic := range committed.Topics {
		s.checkTopicKey(committed, topic.Topic, topic.TopicID, committed.Version >= 10)
		expect(s, committed, "number of partitions", len(topic.Partitions), 1)
		for _, told := range topic.Partitions {
			expect(s, committed, "partition", told.Partition, 1)
			expect(s, committed, "error code", told.ErrorCode, 0)
		}
	}
	expected := fmt.Sprintf("%d: %s", offset, comment)
	s.fetchOffsets(group, version, map[int32]string{1: expected, 2: "-1: "}, []int32{1, 2})
	if version >= 2 {
		s.fetchOffsets(group, version, map[int32]string{1: expected}, nil)
	}
}

// fetchOffsets asks for partitions of the topic, or for everything: what is told has to be as expected.
func (s *session) fetchOffsets(group string, version int16, expected map[int32]string, partitions []int32) {
	request := kmsg.NewPtrOffsetFetchRequest()
	request.Group = group
	one := kmsg.NewOffsetFetchRequestGroup()
	one.Group = group
	if partitions != nil {
		topic := kmsg.NewOffsetFetchRequestTopic()
		topic.Topic, topic.Partitions = mainTopic, partitions
		request.Topics = append(request.Topics, topic)
		keyed := kmsg.NewOffsetFetchRequestGroupTopic()
		keyed.Topic, keyed.TopicID, keyed.Partitions = mainTopic, s.topicID, partitions
		one.Topics = append(one.Topics, keyed)
	}
	request.Groups = append(request.Groups, one)
	response := ask[*kmsg.OffsetFetchResponse](s, request, version)
	expect(s, response, "error code of all", response.ErrorCode, 0)
	found := map[int32]string{}
	tell := func(partition int32, offset int64, metadata *string, code int16) {
		expect(s, response, "error code", code, 0)
		found[partition] = fmt.Sprintf("%d: %s", offset, text(metadata))
	}
	for _, topic := range response.Topics {
		s.checkTopicKey(response, topic.Topic, [16]byte{}, false)
		for _, p := range topic.Partitions {
			tell(p.Partition, p.Offset, p.Metadata, p.ErrorCode)
		}
	}
	for _, told := range response.Groups {
		expect(s, response, "group", told.Group, group)
		expect(s, response, "error code of the group", told.ErrorCode, 0)
		for _, topic := range told.Topics {
			s.checkTopicKey(response, topic.Topic, topic.TopicID, version >= 10)
			for _, p := range topic.Partitions {
				tell(p.Partition, p.Offset, p.Metadata, p.ErrorCode)
			}
		}
	}
	expect(s, response, "offsets", fmt.Sprint(found), fmt.Sprint(expected))
}

// groupLife is the life of a group with one member, which is a static one where versions have that.
func (s *session) groupLife(version int16) {
	group := fmt.Sprintf("life-%d", version)
	var instance *string
	if s.fit(kmsg.JoinGroup, version) >= 5 && s.fit(kmsg.LeaveGroup, version) >= 3 {
		instance = kmsg.StringPtr(fmt.Sprintf("instance-%d", version))
	}
	s.awaitCoordinator(group)
	member := s.join(group, instance, version)
	sync := kmsg.NewPtrSyncGroupRequest()
	sync.Group, sync.Generation, sync.MemberID, sync.InstanceID = group, 1, member, instance
	sync.ProtocolType, sync.Protocol = kmsg.StringPtr(protocolType), kmsg.StringPtr(protocolName)
	own := kmsg.NewSyncGroupRequestGroupAssignment()
	own.MemberID, own.MemberAssignment = member, []byte(assignment)
	sync.GroupAssignment = append(sync.GroupAssignment, own)
	synced := ask[*kmsg.SyncGroupResponse](s, sync, version)
	expect(s, synced, "error code", synced.ErrorCode, 0)
	expect(s, synced, "assignment", string(synced.MemberAssignment), assignment)
	if synced.Version >= 5 {
		expect(s, synced, "protocol type", text(synced.ProtocolType), protocolType)
		expect(s, synced, "protocol", text(synced.Protocol), protocolName)
	}
	heartbeat := kmsg.NewPtrHeartbeatRequest()
	heartbeat.Group, heartbeat.Generation, heartbeat.MemberID, heartbeat.InstanceID = group, 1, member, instance
	beat := ask[*kmsg.HeartbeatResponse](s, heartbeat, version)
	expect(s, beat, "error code", beat.ErrorCode, 0)
	s.describeGroup(group, member, instance, version)
	s.listGroups(group, version)
	leave := kmsg.NewPtrLeaveGroupRequest()
	leave.Group, leave.MemberID = group, member
	leaving := kmsg.NewLeaveGroupRequestMember()
	leaving.MemberID, leaving.InstanceID, leaving.Reason = member, instance, kmsg.StringPtr("the test is over")
	leave.Members = append(leave.Members, leaving)
	left := ask[*kmsg.LeaveGroupResponse](s, leave, version)
	expect(s, left, "error code", left.ErrorCode, 0)
	if left.Version >= 3 {
		expect(s, left, "number of members", len(left.Members), 1)
		for _, told := range left.Members {
			expect(s, left, "error code of the member", told.ErrorCode, 0)
			expect(s, left, "member", told.MemberID, member)
			expect(s, left, "instance", text(told.InstanceID), text(instance))
		}
	}
	beat = ask[*kmsg.HeartbeatResponse](s, heartbeat, version)
	expect(s, beat, "is refused after the member left", beat.ErrorCode != 0, true)
}

// join joins as the only member and gives the member's id.
func (s *session) join(group string, instance *string, version int16) string {
	request := kmsg.NewPtrJoinGroupRequest()
	request.Group, request.InstanceID, request.ProtocolType = group, instance, protocolType
	request.SessionTimeoutMillis, request.RebalanceTimeoutMillis = memberTimeoutMS, memberTimeoutMS
	request.Reason = kmsg.StringPtr("the test begins")
	protocol := kmsg.NewJoinGroupRequestProtocol()
	protocol.Name, protocol.Metadata = protocolName, []byte(memberMetadata)
	request.Protocols = append(request.Protocols, protocol)
	response := ask[*kmsg.JoinGroupResponse](s, request, version)
	if response.Version >= 4 && instance == nil {
		expect(s, response, "error code without a member id", response.ErrorCode, memberIDRequired)
		request.MemberID = response.MemberID
		response = ask[*kmsg.JoinGroupResponse](s, request, version)
		expect(s, response, "member", response.MemberID, request.MemberID)
	}
	expect(s, response, "error code", response.ErrorCode, 0)
	expect(s, response, "generation", response.Generation, 1)
	expect(s, response, "has a member id", response.MemberID != "", true)
	expect(s, response, "leader", response.LeaderID, response.MemberID)
	expect(s, response, "protocol", text(response.Protocol), protocolName)
	expect(s, response, "skips the assignment", response.SkipAssignment, false)
	if response.Version >= 7 {
		expect(s, response, "protocol type", text(response.ProtocolType), protocolType)
	}
	expect(s, response, "number of members", len(response.Members), 1)
	for _, told := range response.Members {
		expect(s, response, "member in the list", told.MemberID, response.MemberID)
		expect(s, response, "instance", text(told.InstanceID), text(instance))
		expect(s, response, "metadata", string(told.ProtocolMetadata), memberMetadata)
	}
	return response.MemberID
}

func (s *session) describeGroup(group, member string, instance *string, version int16) {
	request := kmsg.NewPtrDescribeGroupsRequest()
	request.Groups, request.IncludeAuthorizedOperations = []string{group}, true
	response := ask[*kmsg.DescribeGroupsResponse](s, request, version)
	expect(s, response, "number of groups", len(response.Groups), 1)
	for _, told := range response.Groups {
		expect(s, response, "error code", told.ErrorCode, 0)
		expect(s, response, "group", told.Group, group)
		expect(s, response, "state", told.State, "Stable")
		expect(s, response, "protocol type", told.ProtocolType, protocolType)
		expect(s, response, "protocol", told.Protocol, protocolName)
		if response.Version >= 3 {
			expect(s, response, "tells operations", told.AuthorizedOperations != noOperations, true)
		}
		expect(s, response, "number of members", len(told.Members), 1)
		for _, m := range told.Members {
			expect(s, response, "member", m.MemberID, member)
			if response.Version >= 4 {
				expect(s, response, "instance", text(m.InstanceID), text(instance))
			}
			expect(s, response, "client id", m.ClientID, versionsClientID)
			expect(s, response, "client host", m.ClientHost, "/127.0.0.1")
			expect(s, response, "metadata", string(m.ProtocolMetadata), memberMetadata)
			expect(s, response, "assignment", string(m.MemberAssignment), assignment)
		}
	}
}

// listGroups asks the group's coordinator: each lists its own.
func (s *session) listGroups(group string, version int16) {
	_, _, coordinator := s.coordinatorOf(group, s.latest(kmsg.FindCoordinator))
	response := at[*kmsg.ListGroupsResponse](s, coordinator, kmsg.NewPtrListGroupsRequest(), version)
	expect(s, response, "error code", response.ErrorCode, 0)
	expected := kmsg.NewListGroupsResponseGroup()
	expected.Group, expected.ProtocolType = group, protocolType
	if response.Version >= 4 {
		expected.GroupState = "Stable"
	}
	if response.Version >= 5 {
		expected.GroupType = "classic"
	}
	is := func(told kmsg.ListGroupsResponseGroup) bool { return fmt.Sprint(told) == fmt.Sprint(expected) }
	expect(s, response, "lists the group", slices.ContainsFunc(response.Groups, is), true)
}
